"""The supported model families, and how a checkpoint tells which one it is of."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from safetensors import safe_open

from diffalign.assets import resolve
from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError
from diffalign.layout import PIPELINE_INDEX
from diffalign.models.diffusers_denoiser import DiffusersDenoiser

FAMILIES = {
    "StableDiffusionPipeline": "diffalign.models.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "diffalign.models.sdxl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "diffalign.models.stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "diffalign.models.flux:Flux",
    "PixArtSigmaPipeline": "diffalign.models.pixart_sigma:PixArtSigma",
    "SanaPipeline": "diffalign.models.sana:Sana",
    "ZImagePipeline": "diffalign.models.z_image:ZImage",
}
"""Pipeline class named in model_index.json -> its Denoiser, imported when needed. A new family adds one line."""
SINGLE_FILE_MARKS = (
    ("conditioner.embedders.1.", "StableDiffusionXLPipeline"),
    ("conditioner.embedders.0.", "StableDiffusionXLImg2ImgPipeline"),
    ("model.diffusion_model.joint_blocks.", "StableDiffusion3Pipeline"),
    ("double_blocks.", "FluxPipeline"),
    ("model.diffusion_model.double_blocks.", "FluxPipeline"),
)
"""Start of a weight's name in a single file -> its pipeline, tried in this order; without any, SD 1.x or 2.x."""


def family_of(pipeline: str) -> type[DiffusersDenoiser]:
    """The Denoiser of a pipeline class of `FAMILIES`."""
    module, name = FAMILIES[pipeline].split(":")
    family: type[DiffusersDenoiser] = getattr(importlib.import_module(module), name)
    return family


def require_supported(name: object, config: ModelConfig, file: Path) -> type[DiffusersDenoiser]:
    """The Denoiser of the pipeline class that a checkpoint names in `file`. Raises CheckpointError for any other."""
    if not isinstance(name, str) or name not in FAMILIES:
        raise CheckpointError(
            f"{config.path} is a {name}, which is not supported",
            where=str(file),
            why="only base models that draw pictures from text are: no refiner, no inpainting, no editing",
            hint=f"supported pipelines: {', '.join(FAMILIES)}",
        )
    return family_of(name)


def pipeline_of_file(path: Path, config: ModelConfig) -> str:
    """The pipeline class of a single file: what its configuration says, or else the names of its weights."""
    if config.single_file_config is not None:
        index = resolve(config.single_file_config) / PIPELINE_INDEX
        if index.is_file():
            return str(json.loads(index.read_text(encoding="utf-8")).get("_class_name"))
    with safe_open(path, framework="pt") as file:
        names = file.keys()
    for start, pipeline in SINGLE_FILE_MARKS:
        if any(name.startswith(start) for name in names):
            return pipeline
    return "StableDiffusionPipeline"


def networks_of(family: type[DiffusersDenoiser]) -> tuple[str, ...]:
    """The pipeline's names of all networks with weights."""
    return (family.network_name, "vae", *family.encoder_names)


def parts_of(encoder: str) -> list[str]:
    """The pipeline's names of a text encoder and its tokenizer."""
    return [encoder, encoder.replace("text_encoder", "tokenizer")]
