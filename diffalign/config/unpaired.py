"""Preference optimisation on single pictures, each labelled as liked or not."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from diffalign.config.base import Options
from diffalign.config.data import LABEL_COLUMN, bucket_conflicts
from diffalign.config.run import AlgorithmConfig, Run
from diffalign.config.sizes import BucketsOption


class LabelledConfig(Options):
    path: Annotated[str, Field(min_length=1)]
    """Pictures with a caption and a `label` (true or false): parquet, jsonl, or a folder with metadata.jsonl."""
    from_pairs: bool = False
    """`path` is a file of preference pairs, as dpo takes it: each gives one liked and one disliked picture."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """from_pairs: share of pairs left out by a hash of their prompt, those that dpo holds out of the same file."""
    label_column: Annotated[str, Field(min_length=1)] = LABEL_COLUMN
    """from_pairs: the column of labels, as dpo takes it."""
    cache_latents: bool = True
    """Encode every picture once at the start (kept in memory, float32) instead of at each use."""
    buckets: BucketsOption | None = None
    """Sizes to train at, [[height, width], ...] in pixels, or auto: sizes of about the area of model.resolution. Each
    picture is cropped to the one nearest to its shape; a batch has one size. Default: all at model.resolution."""


class KTOConfig(AlgorithmConfig):
    name: Literal["kto"] = "kto"
    beta: PositiveFloat = 1000.0
    """KL strength, for errors *averaged* over latent elements (the sum convention is beta / D)."""
    desirable_weight: PositiveFloat = 1.0
    """Factor of the loss of liked pictures (the paper's lambda_D)."""
    undesirable_weight: PositiveFloat = 1.0
    """Factor of the loss of disliked pictures (the paper's lambda_U)."""
    batch_size: PositiveInt = 4
    """Pictures per denoiser call and process."""
    gradient_accumulation: PositiveInt = 1
    """Batches per optimizer step; above 1 the reference point takes one more pass without gradients."""


class KTORun(Run):
    implementation = "diffalign.algorithms.kto"
    algorithm: KTOConfig
    data: LabelledConfig

    def _conflicts(self) -> list[str]:
        problems = bucket_conflicts(self.data.buckets, self.model.resolution)
        if self.data.label_column != LABEL_COLUMN and not self.data.from_pairs:
            problems.append("data.label_column: belongs to pairs; set data.from_pairs: true, or leave it out")
        return super()._conflicts() + problems

    def samples_per_iteration(self, processes: int) -> int:
        return self.algorithm.batch_size * self.algorithm.gradient_accumulation * processes
