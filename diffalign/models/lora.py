"""The adapter that a run trains: LoRA, rsLoRA or DoRA, added in float32.

It starts as the identity (B = 0, DoRA's lengths as they are), so a fresh policy equals its reference exactly.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from diffalign.config import LoRAConfig
from diffalign.errors import ConfigError
from diffalign.seeding import derive_seed

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention of a CLIP text encoder."""
TRAINED = "default"
"""peft's name of the adapter that is trained."""


def adaptable_layers(network: nn.Module) -> dict[str, nn.Module]:
    """Name -> each linear and convolution layer as it is without adapters."""
    found: dict[str, nn.Module] = {}
    inside = ""
    for name, module in network.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, LoraLayer):
            found[name], inside = module.get_base_layer(), name + "."
        elif isinstance(module, nn.Linear | nn.Conv2d):
            found[name] = module
    return found


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those names whose end, beginning at a dot, is matched whole by a pattern."""
    expressions = [re.compile(rf"(?:.*\.)?(?:{pattern})") for pattern in patterns]
    return [name for name in names if any(expression.fullmatch(name) for expression in expressions)]


def add_lora(network: Any, config: LoRAConfig, targets: Sequence[str], seed: int) -> None:
    """Add a trainable float32 adapter to every linear or convolution layer that a pattern of `targets` matches.

    Raises:
        ConfigError: no module matches; the message lists the layers that exist.
    """
    names = _targeted(network, config, targets)
    alphas = dict(config.alpha_by_module)
    if config.alpha is None:
        alphas |= {p: rank for p, rank in config.rank_by_module.items() if p not in alphas}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora", type(network).__name__))
        settings = LoraConfig(
            r=config.rank,
            lora_alpha=config.rank if config.alpha is None else config.alpha,
            target_modules=_for_peft(network, targets, names),
            rank_pattern=_that_match(names, config.rank_by_module),
            alpha_pattern=_that_match(names, alphas),
            use_rslora=config.kind == "rslora",
            use_dora=config.kind == "dora",
        )
        add_adapter(network, settings, TRAINED)
    train_in_float32(network)


def add_adapter(network: Any, settings: LoraConfig, name: str) -> None:
    """Put an adapter on a network, under or beside others; it becomes the only one that is active."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        network.add_adapter(settings, adapter_name=name)


def train_in_float32(network: nn.Module) -> None:
    """Make the trained adapter's weights float32; DoRA's lengths are then taken again from the stored weights."""
    for layer in lora_layers(network):
        if TRAINED not in layer.lora_A:
            continue
        for part in (layer.lora_A[TRAINED], layer.lora_B[TRAINED]):
            part.weight.data = part.weight.data.float()
        if TRAINED in layer.lora_magnitude_vector:
            _measure_lengths(layer)


def _measure_lengths(layer: Any) -> None:
    """Set DoRA's lengths to what peft's forward pass divides them by: of convolutions, in the type of autocast."""
    base, lengths = layer.get_base_layer(), layer.lora_magnitude_vector[TRAINED]
    is_half = isinstance(base, nn.Conv2d) and base.weight.dtype != torch.float32
    with torch.autocast(base.weight.device.type, dtype=base.weight.dtype) if is_half else nullcontext():
        lengths.update_layer(
            base_layer=base,
            lora_A=layer.lora_A[TRAINED].weight,
            lora_B=layer.lora_B[TRAINED].weight,
            scaling=layer.scaling[TRAINED],
        )
    lengths.weight.data = lengths.weight.data.float()


def lora_layers(network: nn.Module) -> list[Any]:
    """The layers of a network that adapters sit on."""
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def require_matches(config: LoRAConfig, targets: Mapping[str, tuple[nn.Module, Sequence[str]]]) -> None:
    """Refuse patterns of ranks, alphas and exclusions that no layer with an adapter matches.

    Args:
        targets: the pipeline's name of each trained network -> it, and the patterns of its targets.

    Raises:
        ConfigError: a pattern that does nothing, with the names of layers that there are.
    """
    layers = [
        name
        for network, patterns in targets.values()
        for name in matching(adaptable_layers(network), patterns)
    ]
    options: dict[str, Iterable[str]] = {
        "rank_by_module": config.rank_by_module,
        "alpha_by_module": config.alpha_by_module,
        "exclude_modules": config.exclude_modules,
    }
    for option, patterns in options.items():
        for pattern in patterns:
            if not matching(layers, [pattern]):
                raise ConfigError(
                    f"model.lora.{option}: no module that gets an adapter matches {pattern}",
                    why=f"there are {', '.join(layers[:4])} and {max(0, len(layers) - 4)} more",
                    hint="a pattern is a regular expression for the end of a name: attn2.to_k, down_blocks.0.*to_q",
                )


def _targeted(network: nn.Module, config: LoRAConfig, targets: Sequence[str]) -> list[str]:
    layers = adaptable_layers(network)
    excluded = set(matching(layers, config.exclude_modules))
    names = [name for name in matching(layers, targets) if name not in excluded]
    if names:
        return names
    endings = sorted({name.rsplit(".", 1)[-1] for name in layers if not name.rsplit(".", 1)[-1].isdigit()})
    raise ConfigError(
        f"model.lora.target_modules: no module of {type(network).__name__} matches {', '.join(targets)}"
        + (f" without {', '.join(config.exclude_modules)}" if excluded else ""),
        why="an adapter that matches nothing would train nothing",
        hint=f"module names end in: {', '.join(endings)}",
    )


def _that_match(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    return {pattern: value for pattern, value in values.items() if matching(names, [pattern])}


def _for_peft(network: nn.Module, targets: Sequence[str], names: Sequence[str]) -> list[str] | str:
    """The short list of endings where it means the same, or one expression with every name."""
    suffixes = tuple("." + target for target in targets)
    by_ending = {name for name, _ in network.named_modules() if name in targets or name.endswith(suffixes)}
    return list(targets) if by_ending == set(names) else exactly(names)


def exactly(names: Iterable[str]) -> str:
    """A regular expression that matches these names whole and no other."""
    return "|".join(re.escape(name) for name in names)
