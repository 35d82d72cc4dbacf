"""A pipeline of parts, each with its weights as safetensors: a folder that `save_pretrained` wrote, or a hub id.

Only known libraries' classes are made, and none keeps weights that were not in its files.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError, first_line
from diffalign.layout import PICKLE_SUFFIXES, PIPELINE_INDEX
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.families import networks_of, parts_of, require_supported
from diffalign.models.weights_check import require_all_weights, require_readable, require_tokenizers

PART_LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
"""Libraries that a model_index.json may take its parts from; stable_diffusion is diffusers' old safety checker."""


def load_parts(path: Path, config: ModelConfig, **given: Any) -> Any:
    """The diffusers pipeline of a folder, or of the hub id `config.path` where there is no such folder, float32.

    Args:
        given: parts that are there already, by name; the folder need not have them.

    Raises:
        CheckpointError: nothing there, not safetensors, of no supported family, with parts or weights missing, or
            with weights left over.
    """
    family, without = check_parts(path, config, given)
    absent = {name: None for part in without for name in parts_of(part)}
    pipeline = family.pipeline_class.from_pretrained(
        str(path) if path.is_dir() else config.path,
        revision=config.revision,
        variant=config.variant,
        dtype=torch.float32,
        use_safetensors=True,
        **family.load_options,
        **absent,
        **given,
    )
    loaded = [part for part in networks_of(family) if part not in given]
    require_all_weights(pipeline, loaded, config.variant)
    require_tokenizers(pipeline, family.encoder_names)
    return pipeline


def check_parts(
    path: Path, config: ModelConfig, given: Collection[str] = ()
) -> tuple[type[DiffusersDenoiser], list[str]]:
    """The family of what `load_parts` would load, and the text encoders that it does without; raises what that does."""
    return _check_folder(path, config, given) if path.is_dir() else _check_hub(config)


def _check_folder(
    path: Path, config: ModelConfig, given: Collection[str]
) -> tuple[type[DiffusersDenoiser], list[str]]:
    """The family of a folder that has all its weights as safetensors, and the text encoders that it does without."""
    index_file = path / PIPELINE_INDEX
    if not index_file.is_file():
        raise CheckpointError(
            f"{config.path} is not a diffusers checkpoint",
            where=str(index_file),
            why="a diffusers folder has a model_index.json",
            hint="give the folder that save_pretrained wrote, a hub id, or a single .safetensors file",
        )
    try:
        index = json.loads(index_file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{index_file} is not JSON", why=first_line(error)) from error
    family, without = _check_index(index, config, index_file)
    for part in networks_of(family):
        if part in without or part in given:
            continue
        files = [file.suffix for file in (path / part).glob("*")] if (path / part).is_dir() else []
        if ".safetensors" in files:
            require_readable(path / part)
            continue
        pickled = any(suffix in PICKLE_SUFFIXES for suffix in files)
        raise CheckpointError(
            f"{config.path} has no safetensors weights for its {part}",
            where=str(path / part),
            why="only pickle files are there, and those can run code"
            if pickled
            else "the weights are missing",
            hint="save the pipeline again with save_pretrained(folder, safe_serialization=True)",
        )
    return family, without


def _check_index(index: Any, config: ModelConfig, file: Path) -> tuple[type[DiffusersDenoiser], list[str]]:
    """The family, and the text encoders that it does without, of a pipeline of ours.

    Its parts must be of known libraries: diffusers imports whatever module the index names.
    """
    name = index.get("_class_name") if isinstance(index, dict) else None
    family = require_supported(name, config, file)
    for part, value in index.items():
        if isinstance(value, list) and (not value or value[0] not in PART_LIBRARIES):
            raise CheckpointError(
                f"the {part} of {config.path} comes from a library that checkpoints may not name",
                where=str(file),
                why=f"{value}; known are {', '.join(filter(None, PART_LIBRARIES))}",
            )
    absent = [part for part in networks_of(family) if index.get(part) in (None, [None, None])]
    needed = [part for part in absent if part not in family.optional_encoders]
    if needed:
        raise CheckpointError(
            f"{config.path} has no {', '.join(needed)}",
            where=str(file),
            why=f"a {family.__name__} is made of {', '.join(networks_of(family))}",
            hint="give a text-to-picture base model; a refiner, which has one text encoder, is not one",
        )
    return family, absent


def _check_hub(config: ModelConfig) -> tuple[type[DiffusersDenoiser], list[str]]:
    """The same of a hub model, whose files are not all here yet."""
    parts = config.path.split("/")
    if config.path.startswith((".", "/", "~")) or len(parts) != 2 or not all(parts):
        raise CheckpointError(
            f"{config.path} does not exist",
            where=f"model.path = {config.path}",
            hint="give an existing folder or file, a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5, "
            "or bundled:tiny-sd",
        )
    from huggingface_hub import hf_hub_download

    try:
        index = Path(hf_hub_download(config.path, PIPELINE_INDEX, revision=config.revision))
    except Exception as error:
        raise CheckpointError(
            f"{config.path} is neither a local path nor a hub model that can be read",
            where=f"model.path = {config.path}"
            + (f", revision {config.revision}" if config.revision else ""),
            why=first_line(error),
            hint="check the spelling and the network; a gated model needs `hf auth login`",
        ) from error
    return _check_index(json.loads(index.read_text(encoding="utf-8")), config, index)
