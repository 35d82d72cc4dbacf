"""Finished runs of every family at tiny size, for the tests of `diffalign export`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import tiny_pipeline
from families import SIDE, sampled, tiny_flux, tiny_sd3, tiny_sdxl
from torch import Tensor

from diffalign.config import RUNS, LoRAConfig, ModelConfig, SamplerConfig
from diffalign.config_file import dump_config
from diffalign.exporting.formats import WRITERS
from diffalign.exporting.source import find_result, loaded_result
from diffalign.models.families import family_of

DIFFUSION = SamplerConfig(steps=2, eta=0.0, guidance_scale=3.0)
FLOW = SamplerConfig(kind="euler", steps=2, guidance_scale=3.0)
LORA = "pytorch_lora_weights.safetensors"
RANK, ALPHA = 2, 5.0
"""A scale of 2.5: a reader that takes alpha for the rank draws other pictures."""


def tiny_sd3_of_stability() -> Any:
    """CLIP-L's projection is the identity in Stability's checkpoints."""
    pipeline = tiny_sd3()
    projection = pipeline.text_encoder.text_projection.weight
    projection.data = torch.eye(len(projection))
    return pipeline


FAMILIES: dict[str, tuple[Callable[[], Any], SamplerConfig]] = {
    "sd": (tiny_pipeline, DIFFUSION),
    "sdxl": (tiny_sdxl, DIFFUSION),
    "sd3": (tiny_sd3_of_stability, FLOW),
    "flux": (tiny_flux, FLOW),
}


class FinishedRun:
    """A run's folder with config.yaml and final/, its base model, and its own pictures.

    Args:
        full: it trained all weights instead of an adapter.
        text_encoder: it trained the text encoders, too.
        adapters: LoRAs that it started with.
        lora: other options of the adapter.
    """

    def __init__(
        self,
        folder: Path,
        family: str,
        *,
        full: bool = False,
        text_encoder: bool = True,
        adapters: list[dict[str, str]] | None = None,
        **lora: object,
    ) -> None:
        self.family, (build, self.sampler) = family, FAMILIES[family]
        self.base, self.path = folder / "base", folder / "run"
        pipeline = build()
        pipeline.save_pretrained(self.base)
        self._base = pipeline
        adapter = None if full else LoRAConfig(**{"rank": RANK, "alpha": ALPHA, **lora})
        model = ModelConfig(
            path=str(self.base),
            lora=adapter,
            resolution=SIDE,
            train_text_encoder=text_encoder,
            adapters=adapters or [],
        )
        self.config = RUNS["sft"](model=model, data={"path": "unused"}, algorithm={"name": "sft"})
        denoiser = self.trainable()
        self.before = pictures(denoiser, self.sampler)
        _learn(denoiser)
        self.pictures = pictures(denoiser, self.sampler)
        self.path.mkdir(parents=True)
        denoiser.export(self.path / "final")
        (self.path / "config.yaml").write_text(dump_config(self.config))

    def trainable(self) -> Any:
        """The policy as it was before training."""
        pipeline, model = self.base_pipeline(), self.config.model
        return family_of(type(pipeline).__name__)(pipeline, model, device=torch.device("cpu"), trainable=True)

    def pictures_of(self, pipeline: Any) -> Tensor:
        """The same prompts and seeds with a pipeline that diffusers has loaded."""
        config = ModelConfig(path="loaded", lora=None, resolution=SIDE)
        denoiser = family_of(type(pipeline).__name__)(pipeline, config, device=torch.device("cpu"))
        return pictures(denoiser, self.sampler)

    def base_pipeline(self) -> Any:
        """As `from_pretrained` of `base` gives it."""
        return copy.deepcopy(self._base)


@torch.no_grad()
def pictures(denoiser: Any, sampler: SamplerConfig) -> Tensor:
    return denoiser.decode(sampled(denoiser, sampler))


def _learn(denoiser: Any) -> None:
    """Move every trained weight so far that pictures change."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.trainable_parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))


def difference(one: Tensor, other: Tensor) -> float:
    """The greatest of any pixel, in steps of 1/255."""
    return float((one - other).abs().max()) * 255


FORMATS = {"sd": list(WRITERS), "sdxl": list(WRITERS), "sd3": list(WRITERS)}
FORMATS["flux"] = ["diffusers", "peft", "merged"]  # the others: test_original.py
FILES = {"kohya", "single-file"}


class Exports:
    """A run in all formats."""

    def __init__(self, folder: Path, family: str, forms: list[str] | None = None, **options: Any) -> None:
        self.run, self.folder = FinishedRun(folder, family, **options), folder / "exports"
        with loaded_result(find_result(str(self.run.path))) as loaded:
            for form in forms or FORMATS[family]:  # those that add the adapters to the weights come last
                (self.folder if form in FILES else self[form]).mkdir(parents=True, exist_ok=True)
                WRITERS[form](loaded, self[form], torch.float32)

    def __getitem__(self, form: str) -> Path:
        return self.folder / (f"{form}.safetensors" if form in FILES else form)

    def draw_the_same(self, pipeline: Any) -> bool:
        return difference(self.run.pictures_of(pipeline), self.run.pictures) < 2
