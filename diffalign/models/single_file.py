"""A whole checkpoint as one .safetensors file, in the layout that it was published in before diffusers'.

diffusers converts it; whether each of its weights arrived, and every network has all of its own, is checked here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import safe_open
from transformers import PreTrainedModel

from diffalign.assets import resolve
from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError, first_line
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.families import networks_of, parts_of, pipeline_of_file, require_supported
from diffalign.models.pipeline_folder import check_parts, load_parts
from diffalign.models.weights_check import require_match, require_tokenizers

NETWORK = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
ENCODERS = ("cond_stage_model.", "conditioner.", "text_encoders.")
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
    except SingleFileComponentError as error:  # a whole network is not in it
        if config.single_file_config is None or _has_encoder_or_vae(path):
            raise _incomplete(path, config, first_line(error)) from error
        return _load_network(path, family, config, config.single_file_config)
    except NotImplementedError as error:
        raise _incomplete(path, config, "the denoising network or the VAE is not whole") from error
    _require_whole(pipeline, networks_of(family), path)
    require_tokenizers(pipeline, family.encoder_names)
    return pipeline


def _load_network(path: Path, family: type[DiffusersDenoiser], config: ModelConfig, base: str) -> Any:
    """The pipeline `base` with the denoising network of the file, which is all that it holds (as FLUX.1's does)."""
    folder = resolve(base)
    source = str(folder) if folder.is_dir() else base
    named = DiffusionPipeline.load_config(source)[family.network_name]
    kind = named[-1] if isinstance(named, list | tuple) else None
    if kind not in SINGLE_FILE_LOADABLE_CLASSES:
        raise CheckpointError(
            f"model.single_file_config: {base} has no {family.network_name} that a single file could hold",
            why=f"its model_index.json names {kind}",
            hint="give the folder or hub id of the base model that the file was made from",
        )
    own = config.model_copy(update={"path": base, "revision": None, "variant": None})
    check_parts(folder, own, [family.network_name])
    network = getattr(diffusers, str(kind)).from_single_file(
        str(path), config=source, subfolder=family.network_name, dtype=torch.float32
    )
    pipeline = load_parts(folder, own, **{family.network_name: network})
    _require_whole(pipeline, [family.network_name], path)
    return pipeline


def _incomplete(path: Path, config: ModelConfig, why: str) -> CheckpointError:
    return CheckpointError(
        f"{config.path} lacks some of the weights of its pipeline",
        where=str(path),
        why=why,
        hint="a LoRA goes to model.adapters; beside a file with the denoising network alone (flux1-dev.safetensors), "
        "model.single_file_config names the folder or hub id that has the rest",
    )


def _has_encoder_or_vae(path: Path) -> bool:
    """Whether a single file holds more than a denoising network."""
    with safe_open(path, framework="pt") as file:
        return any(name.startswith((*VAE, *ENCODERS)) for name in file.keys())  # noqa: SIM118


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
