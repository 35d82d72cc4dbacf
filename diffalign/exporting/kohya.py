"""LoRA weights by kohya's names, which ComfyUI, A1111 and their kin read.

    <prefix>_<module, dots as underscores>.lora_down.weight, .lora_up.weight, .alpha

Stable Diffusion 1 and 2 have the module names of diffusers, as kohya's sd-scripts write them; SDXL, SD 3 and FLUX.1
those of their original networks, where query, key and value are one layer in SD 3 and FLUX.1. Text encoders have the
names that transformers gave them before version 5.6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.exporting.low_rank import alpha_of, flip, require_plain, stacked, with_one_alpha
from diffalign.exporting.places import Place, Places, flux_places, sd3_places, unet_places
from diffalign.models.lora import adaptable_layers
from diffalign.models.lora_updates import Update, Updates


@dataclass(frozen=True)
class KohyaFamily:
    """How the names of one family are made."""

    module: str
    """sd-scripts' network module: which of its scripts reads the file."""
    places: Callable[[Any], Places]
    """Of the denoising network."""
    encoders: Mapping[str, str]
    """The pipeline's name of a text encoder -> prefix."""


def _as_in_diffusers(_: Any) -> Places:
    return Place


_TWO = {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
KOHYA = {
    "StableDiffusion": KohyaFamily("networks.lora", _as_in_diffusers, {"text_encoder": "lora_te"}),
    "StableDiffusionXL": KohyaFamily("networks.lora", unet_places, _TWO),
    "StableDiffusion3": KohyaFamily("networks.lora_sd3", sd3_places, _TWO),
    "Flux": KohyaFamily("networks.lora_flux", flux_places, {"text_encoder": "lora_te1"}),
}
"""Class of the Denoiser -> its names."""
NETWORK_PREFIX = "lora_unet"
"""Also of a transformer."""


def require_kohya(family: str) -> KohyaFamily:
    """Raises ConfigError for a family whose kohya names are not known."""
    if family not in KOHYA:
        raise ConfigError(
            f"--format kohya: the names of {family} are not known",
            why=f"they are for {', '.join(KOHYA)}",
            hint="use --format diffusers, peft or merged",
        )
    return KOHYA[family]


def kohya_weights(
    family: str, updates: Mapping[str, Updates], networks: Mapping[str, Any]
) -> tuple[dict[str, Tensor], set[tuple[int, float]]]:
    """The tensors of the file, and each (rank, alpha) that a module has before query, key and value are fused.

    Args:
        family: the Denoiser's class.
        updates: the pipeline's name of each network that the LoRA changes -> how.
        networks: the same names -> the network.

    Raises:
        ConfigError: a family, a module or an adapter that kohya's layout has no place for.
    """
    names = require_kohya(family)
    tensors: dict[str, Tensor] = {}
    sizes: set[tuple[int, float]] = set()
    for name, changes in updates.items():
        require_plain(changes)
        own = with_one_alpha(changes)
        sizes |= {(update.rank, alpha_of(update)) for update in own.values()}
        if name in names.encoders:
            prefix, placed = names.encoders[name], {clip_name(m): update for m, update in own.items()}
        else:
            network = networks[name]
            prefix, placed = NETWORK_PREFIX, original_updates(network, own, names.places(network))
        for module, update in placed.items():
            tensors |= _entries(f"{prefix}_{module.replace('.', '_')}", update)
    return tensors, sizes


def clip_name(module: str) -> str:
    """A CLIP text encoder's module as it was named before transformers 5.6 left `text_model` out."""
    return module if module.startswith(("text_model.", "text_projection")) else f"text_model.{module}"


def original_updates(network: Any, updates: Updates, places: Places) -> dict[str, Update]:
    """The updates of a network by the modules of its original layout.

    Raises:
        ConfigError: a module that the layout does not have.
    """
    layers: Mapping[str, Any] = adaptable_layers(network)
    touched = {_place(places, module).name for module in updates}
    fused: dict[str, dict[int, str]] = {}
    for module in layers:
        place = _place(places, module)
        if place.name in touched:
            fused.setdefault(place.name, {})[place.part] = module
    placed: dict[str, Update] = {}
    for name, parts in fused.items():
        modules = [parts[part] for part in sorted(parts)]
        update = updates.get(modules[0])
        if len(modules) > 1 or update is None:
            update = stacked([(len(layers[module].weight), updates.get(module)) for module in modules])
        flipped = places(modules[0]).flipped
        placed[name] = replace(update, up=flip(update.up)) if flipped else update
    return placed


def _place(places: Places, module: str) -> Place:
    try:
        return places(module)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            f"--format kohya: the original layout has no name for {module}",
            why="this network has a module that the published ones of its family have not",
            hint="use --format diffusers, peft or merged",
        ) from error


def _entries(name: str, update: Update) -> dict[str, Tensor]:
    return {
        f"{name}.lora_down.weight": update.down,
        f"{name}.lora_up.weight": update.up,
        f"{name}.alpha": torch.tensor(alpha_of(update)),
    }
