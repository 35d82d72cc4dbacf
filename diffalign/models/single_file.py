"""A whole checkpoint as one .safetensors file, in the layout that it was published in before diffusers'.

diffusers converts it; whether each of its weights arrived, and every network has all of its own, is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import safe_open
from transformers import PreTrainedModel

from diffalign.assets import resolve
from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError
from diffalign.models.families import networks_of, parts_of, pipeline_of_file, require_supported
from diffalign.models.weights_check import require_match, require_tokenizers

NETWORK = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
"""How names begin in a single file."""
T5 = "text_encoders.t5xxl."


def load_single_file(path: Path, config: ModelConfig) -> Any:
    """The diffusers pipeline in one file, float32.

    Raises:
        CheckpointError: no safetensors, of no supported family, or with weights missing or left over.
    """
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{config.path} is not a .safetensors file",
            hint="give a diffusers folder, a hub id or a .safetensors file",
        )
    family = require_supported(pipeline_of_file(path, config), config, path)
    options = dict(family.load_options)
    options.pop("feature_extractor", None)
    options.pop("image_encoder", None)
    if config.single_file_config is not None:
        options["config"] = str(resolve(config.single_file_config))
    if not _has_t5(path):
        options |= {name: None for part in family.optional_encoders for name in parts_of(part)}
    try:
        pipeline = family.pipeline_class.from_single_file(str(path), dtype=torch.float32, **options)
    except (
        NotImplementedError,
        SingleFileComponentError,
    ) as error:  # a weight, or a whole network, is not in it
        raise CheckpointError(
            f"{config.path} lacks some of the weights of its pipeline",
            where=str(path),
            why="the denoising network or the VAE is not whole"
            if isinstance(error, NotImplementedError)
            else str(error).splitlines()[0],
            hint="a file with the denoising network alone (flux1-dev.safetensors) or a LoRA (model.adapters) does not "
            "do: give a full checkpoint or a diffusers folder, or the matching model.single_file_config",
        ) from error
    _require_whole(pipeline, networks_of(family), path)
    require_tokenizers(pipeline, family.encoder_names)
    return pipeline


def _has_t5(path: Path) -> bool:
    """Whether a single file of Stable Diffusion 3 comes with its third text encoder."""
    with safe_open(path, framework="pt") as file:
        names = file.keys()
    return any(name.startswith(T5) for name in names)


def _require_whole(pipeline: Any, names: Iterable[str], file: Path) -> None:
    """Compare the networks of a pipeline that was just loaded from a single file with what is in it.

    diffusers leaves a weight that it does not find without values (on the meta device), and says nothing of most that
    it makes no use of. Text encoders may come with more than is used, as in a folder.

    Raises:
        CheckpointError: weights that the file lacks, or that the denoising network or the VAE has no place for.
    """
    for name in names:
        network, left_over = getattr(pipeline, name), list[str]()
        if network is None:
            continue
        if isinstance(network, PreTrainedModel):
            network.tie_weights()  # a file may hold T5's embedding once
        else:
            left_over = _not_converted(network, file, VAE if name == "vae" else NETWORK)
        missing = sorted(key for key, value in network.state_dict().items() if value.is_meta)
        require_match(name, missing, left_over, file)


def _not_converted(network: Any, file: Path, starts: str | tuple[str, ...]) -> list[str]:
    """The names in a single file with one of these `starts` that diffusers' conversion makes nothing of.

    What is converted is not the weights, but for each a tensor of its shape that holds its number, and no memory.
    """
    with safe_open(file, framework="pt") as opened:
        names = list(opened.keys())
        shapes = [opened.get_slice(name).get_shape() for name in names]
    marks = {
        name: torch.tensor(float(number)).expand(shape)
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True))
    }
    (kind,) = (
        base.__name__ for base in type(network).__mro__ if base.__name__ in SINGLE_FILE_LOADABLE_CLASSES
    )
    convert: Any = SINGLE_FILE_LOADABLE_CLASSES[kind]["checkpoint_mapping_fn"]
    converted = convert(checkpoint=marks, config=network.config)
    used = {names[int(converted[name].flatten()[0])] for name in network.state_dict() if name in converted}
    return sorted(name for name in names if name.startswith(starts) and name not in used)
