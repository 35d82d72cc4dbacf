"""What a method learns from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from diffalign.config.base import Options
from diffalign.config.sizes import BucketsOption, Resolution


def bucket_conflicts(buckets: BucketsOption | None, resolution: Resolution | None) -> list[str]:
    """What is wrong between `data.buckets` and `model.resolution`."""
    if buckets == "auto" and resolution is None:
        return ["data.buckets: auto makes sizes of the area of model.resolution; set that too"]
    return []


LABEL_COLUMN = "label_0"
"""Of preference pairs, as Pick-a-Pic names it."""


class PicturesConfig(Options):
    path: Annotated[str, Field(min_length=1)]
    """A folder (metadata.jsonl, or a .txt beside each picture) or a parquet file."""
    image_column: str | None = None
    """Parquet column of the picture. Default: the first of image, jpg, png, picture."""
    caption_column: str | None = None
    """Column or jsonl key of the caption. Default: the first of text, caption, prompt."""
    cache_latents: bool = True
    """Encode every picture once at the start (kept in memory, float32) instead of at each use."""


class ImagesConfig(PicturesConfig):
    buckets: BucketsOption | None = None
    """Sizes to train at, [[height, width], ...] in pixels, or auto: sizes of about the area of model.resolution. Each
    picture is cropped to the one nearest to its shape; a batch has one size. Default: all at model.resolution."""


class PairsConfig(Options):
    path: Annotated[str, Field(min_length=1)]
    """Parquet with Pick-a-Pic columns (caption, jpg_0, jpg_1, label_0); jsonl (prompt, chosen, rejected)."""
    label_column: Annotated[str, Field(min_length=1)] = LABEL_COLUMN
    """Column of the probability that picture 0 is preferred, where one set of pictures has labels of several judges.
    The columns has_label and margin belong to label_0, and are left aside with another."""
    validation_path: str | None = None
    """Held-out pairs. Default: `validation_fraction` of `path`."""
    validation_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    """Share of pairs held out by a hash of their prompt; 0: none."""
    cache_latents: bool = True
    """Encode every picture once at the start instead of at each use."""
    buckets: BucketsOption | None = None
    """Sizes to train at, [[height, width], ...] in pixels, or auto: sizes of about the area of model.resolution. Both
    pictures of a pair are cropped to the one nearest to the preferred one's shape. Default: all at model.resolution."""


class PromptsConfig(Options):
    path: Annotated[str, Field(min_length=1)]
    """.txt (one a line), .jsonl or .parquet (`prompt`), .csv or .tsv (`prompt` column)."""
