"""LoRAs that there are already: files of diffusers, kohya and PEFT, and the results of runs, as `Update`s.

Names are translated by diffusers' own converters. Whatever a file has and the model does not take is an error; nothing
is left out silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diffalign.config import AdapterConfig
from diffalign.errors import CheckpointError, first_line
from diffalign.models.lora import adaptable_layers
from diffalign.models.lora_paths import LoraSource, find_lora
from diffalign.models.lora_updates import Update, Updates

_PEFT_NAME = re.compile(r"\.lora_(A\.weight|B\.weight|magnitude_vector|magnitude_vector\.weight)$")
_MARKS = (
    ("joint_blocks", "Stable Diffusion 3, of kohya"),
    ("double_blocks", "FLUX.1, of kohya"),
    ("single_transformer_blocks", "FLUX.1"),
    ("text_encoder_2", "Stable Diffusion XL"),
    ("lora_te2_", "Stable Diffusion XL, of kohya"),
    ("input_blocks_", "Stable Diffusion XL, of kohya"),
    ("down_blocks", "a UNet: Stable Diffusion 1, 2 or XL"),
    ("transformer.", "a transformer: Stable Diffusion 3, FLUX.1 or another"),
)
"""Part of a weight's name -> the kind of model that the LoRA seems to be of, tried in this order."""
_OTHER_KINDS = {".dora_scale": "DoRA in kohya's format", ".hada_w": "LoHa", ".lokr_w": "LoKr"}
"""Part of a weight's name -> what the file is that has it."""
_DROPPED = re.compile(
    r"\.diff(_b)?$|^text_encoders\.t5xxl|^lora_te[23]_"
    r"|^(lora_te|text_encoders\.).*(position_embedding|text_projection)"
)
"""Weights that diffusers leaves out of a transformer's LoRA in kohya's or ComfyUI's names, with a line in its log."""
_DAMAGED = (SafetensorError, OSError, ValueError, LookupError, RuntimeError, TypeError, AttributeError)
"""What diffusers, peft and torch raise for a file that is not as it should be."""


@dataclass(frozen=True)
class _File:
    """A file's weights by diffusers' names, and by network what says its alphas: one of the two, or neither.

    `alphas`: module -> alpha. `configs`: peft's own description.
    """

    tensors: dict[str, Tensor]
    alphas: dict[str, dict[str, float]]
    configs: dict[str, LoraConfig]


def read_lora(config: AdapterConfig, pipeline: Any, networks: Mapping[str, Any]) -> dict[str, Updates]:
    """What a LoRA changes.

    Args:
        config: which one.
        pipeline: of the model; its loaders know the names of its family. Its weights stay as they are.
        networks: the pipeline's name of each network that may have an adapter -> it.

    Returns:
        The names of those that it changes -> the updates.

    Raises:
        CheckpointError: not there, a pickle, damaged, of another family or base, or with weights that no module takes.
    """
    source = find_lora(config)
    try:
        with safe_open(source.file, framework="pt") as opened:
            names = list(opened.keys())
            _require_readable(source, names)
            if not hasattr(pipeline, "unet"):
                _require_kept(source, names, lambda name: bool(opened.get_tensor(name).any()))
        file = _peft_file(source, networks) if source.is_peft else _pipeline_file(source, pipeline, networks)
        parts = _require_fit(source, file, names, pipeline, networks)
        return {part: _updates(part, own, file) for part, own in parts.items()}
    except _DAMAGED as error:
        raise CheckpointError(
            f"the LoRA weights cannot be read: {config.path}",
            where=str(source.file),
            why=first_line(error),
            hint="a damaged file, or one in a format that diffusers does not know: download or export it again",
        ) from error


def _require_readable(source: LoraSource, names: list[str]) -> None:
    """Refuse what diffusers would drop without an error."""
    other = next((kind for mark, kind in _OTHER_KINDS.items() if any(mark in name for name in names)), None)
    if other is not None:
        raise CheckpointError(
            f"{source.given} is a {other}, which diffusers does not read",
            where=str(source.file),
            hint="give a LoRA, or a DoRA in diffusers' or PEFT's format",
        )
    if not any("lora" in name for name in names):
        raise CheckpointError(
            f"{source.given} holds no LoRA",
            where=str(source.file),
            why=f"its weights are {', '.join(sorted(names)[:3])}, ...",
            hint="a whole model is given as model.path",
        )


def _require_kept(source: LoraSource, names: list[str], has_effect: Callable[[str], bool]) -> None:
    """Refuse weights of a transformer's LoRA that diffusers' converter would leave out."""
    there, mixed = set(names), any(name.startswith("transformer.") for name in names)
    left = []
    for name in names:
        pair = (
            name.replace("lora_down", "lora_up")
            if "lora_down" in name
            else name.replace("lora_up", "lora_down")
        )
        is_beside = mixed and name.startswith(("lora_te", "lora_unet_", "text_encoders."))
        if _DROPPED.search(name) or pair not in there or is_beside:
            left.append(name)
    left = [name for name in left if not name.endswith(".alpha") and has_effect(name)]
    if left:
        raise CheckpointError(
            f"{source.given} changes more than diffusers reads of it",
            where=str(source.file),
            why=f"it leaves out {len(left)} of the {len(names)} weights: {', '.join(left[:3])}",
            hint="give a LoRA of the transformer and the first text encoder, whose weights are all in pairs",
        )


def _pipeline_file(source: LoraSource, pipeline: Any, networks: Mapping[str, Any]) -> _File:
    """A file of diffusers or kohya, by the pipeline's own loader."""
    options = {"unet_config": pipeline.unet.config} if hasattr(pipeline, "unet") else {}
    tensors, *others = pipeline.lora_state_dict(
        str(source.file.parent),
        weight_name=source.file.name,
        use_safetensors=True,
        return_alphas=True,
        return_lora_metadata=True,
        **options,
    )
    alphas = (others[0] or {}) if len(others) == 2 else {}
    settings = {part: _of_part(part, others[-1] or {}) for part in networks}
    return _File(
        {name: tensor.float() for name, tensor in tensors.items()},
        {part: _by_module(_of_part(part, alphas), network) for part, network in networks.items()},
        {part: LoraConfig(**own) for part, own in settings.items() if own},
    )


def _of_part(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    start = part + "."
    return {name.removeprefix(start): value for name, value in values.items() if name.startswith(start)}


def _by_module(alphas: Mapping[str, Any], network: Any) -> dict[str, float]:
    """Module -> alpha. diffusers calls an alpha by its module, or by the weight that it belongs to.

    diffusers itself misses those of attention layers where a file has several alphas (0.42).
    """
    bare = {name.removesuffix(".alpha"): torch.as_tensor(float(value)) for name, value in alphas.items()}
    weights = {name: value for name, value in bare.items() if name.endswith(".weight")}
    modules = {name: value for name, value in bare.items() if name not in weights}
    named = {**_flat(modules, network), **_peft_names(weights, network)}
    return {name.partition(".lora_")[0]: float(value) for name, value in named.items()}


def _peft_file(source: LoraSource, networks: Mapping[str, Any]) -> _File:
    """What PEFT's save_pretrained wrote: of the denoising network, or of whichever network has all its modules."""
    raw = load_file(source.file)
    own = {name.removeprefix("base_model.model."): tensor.float() for name, tensor in raw.items()}
    fitting = [part for part, network in networks.items() if not _misfits(_flat(own, network), network)]
    denoising = next(part for part in networks if not part.startswith("text_encoder"))
    part = next(iter(fitting), denoising)
    config = PeftConfig.from_pretrained(str(source.file.parent))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"an adapter of the kind {config.peft_type}, not a LoRA")
    return _File({f"{part}.{name}": tensor for name, tensor in own.items()}, {}, {part: config})


def _peft_names(tensors: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """A network's weights under peft's names, whatever the age of the file."""
    named = dict(tensors)
    if isinstance(network, ModelMixin):
        return dict(convert_unet_state_dict_to_peft(named))
    if not all(_PEFT_NAME.search(name) for name in named):
        named = convert_state_dict_to_peft(convert_state_dict_to_diffusers(named))
    return _flat(named, network)


def _flat(tensors: Mapping[str, Tensor], network: Any) -> dict[str, Tensor]:
    """Without the part of the names that CLIP had before transformers 5."""
    if hasattr(network, "text_model"):
        return dict(tensors)
    return {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}


def _misfits(tensors: Mapping[str, Tensor], network: Any) -> dict[str, str]:
    """Name -> what is wrong, of each weight that no module takes as it is."""
    layers = adaptable_layers(network)
    found = {}
    for name, tensor in tensors.items():
        module, _, part = name.partition(".lora_")
        if module not in layers or not _PEFT_NAME.search(name):
            found[name] = name
            continue
        layer: Any = layers[module]
        if isinstance(layer, nn.Linear):
            before, after = (layer.in_features,), layer.out_features
        else:
            before, after = (layer.in_channels, *layer.kernel_size), layer.out_channels
        if part == "A.weight" and tuple(tensor.shape[1:]) != before:
            found[name] = f"{module} takes {before[0]}, this LoRA {tensor.shape[1]}"
        elif part == "B.weight" and len(tensor) != after:
            found[name] = f"{module} returns {after}, this LoRA {len(tensor)}"
        elif "magnitude" in part and tensor.numel() != after:
            found[name] = f"{module} returns {after}, this DoRA has lengths of {tensor.numel()}"
    return found


def _require_fit(
    source: LoraSource, file: _File, names: list[str], pipeline: Any, networks: Mapping[str, Any]
) -> dict[str, dict[str, Tensor]]:
    """The weights of each network by peft's names. Raises CheckpointError for any that no module takes."""
    left, parts = set(file.tensors), {}
    wrong: list[str] = []
    for part, network in networks.items():
        own = _of_part(part, file.tensors)
        left -= {f"{part}.{name}" for name in own}
        if own:
            parts[part] = _peft_names(own, network)
            wrong += _misfits(parts[part], network).values()
    wrong += sorted(left)
    if not wrong:
        return parts
    looks = next((kind for mark, kind in _MARKS if any(mark in name for name in names)), None)
    raise CheckpointError(
        f"{source.given} is a LoRA of another model than {type(pipeline).__name__}",
        where=str(source.file),
        why=f"no module takes {len(wrong)} of its {len(file.tensors)} weights: {'; '.join(wrong[:3])}"
        + (f"\nits names look like those of {looks}" if looks else ""),
        hint="give a LoRA that was trained on this base model, in the format of diffusers, kohya or PEFT",
    )


def _updates(part: str, tensors: Mapping[str, Tensor], file: _File) -> dict[str, Update]:
    """A network's updates, from its weights under peft's names. Raises ValueError for half of a pair."""
    updates = {}
    for module in dict.fromkeys(name.partition(".lora_")[0] for name in tensors):
        down, up = (tensors.get(f"{module}.lora_{side}.weight") for side in "AB")
        if down is None or up is None or down.shape[0] != up.shape[1]:
            raise ValueError(f"{part}.{module} has no pair of lora_A and lora_B of one rank")
        name = f"{module}.lora_magnitude_vector"
        magnitude = tensors.get(name, tensors.get(name + ".weight"))
        update = updates[module] = Update(down, up, _scale(module, len(down), part, file), magnitude)
        parts = [down, up, torch.tensor(update.scale), *([] if magnitude is None else [magnitude])]
        if not all(tensor.isfinite().all() for tensor in parts):
            raise ValueError(f"{part}.{module} has numbers that are not finite")
    left = file.alphas.get(part, {}).keys() - updates
    if left:
        raise ValueError(f"{part}: the alpha of {sorted(left)[0]} belongs to no weight of the file")
    return updates


def _scale(module: str, rank: int, part: str, file: _File) -> float:
    """alpha / rank as the file says it; without an alpha it is 1."""
    config = file.configs.get(part)
    if config is None:
        return file.alphas.get(part, {}).get(module, float(rank)) / rank
    known = config.rank_pattern.get(get_pattern_key(config.rank_pattern, module), config.r)
    if known != rank:
        raise ValueError(f"{part}.{module} has rank {rank}, and the file's own settings say {known}")
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))
