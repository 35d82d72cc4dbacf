"""Low-rank updates as tensors: read off a network, added to its weights, put on it as an adapter, summed, written.

W' = W + scale * up @ down                    (LoRA, rsLoRA)
W' = m (W + scale * up @ down) / |W + ...|    (DoRA, |.| the length of each row)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffalign.models.lora import adaptable_layers, add_adapter, exactly


@dataclass(frozen=True)
class Update:
    """The change of one layer, float32 on the CPU.

    Args:
        down: [rank, in]; of a convolution [rank, in, k, k].
        up: [out, rank]; of a convolution [out, rank, 1, 1].
        scale: alpha / rank, or alpha / sqrt(rank) of rsLoRA.
        magnitude: DoRA's lengths of rows, [out] or [1, out, 1, 1].
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.down)


Updates = Mapping[str, Update]
"""Module name -> its change."""


def updates_of(network: nn.Module, adapter: str) -> dict[str, Update]:
    """The changes that an adapter of peft's makes to a network."""
    found = {}
    for name, layer in network.named_modules():
        if not isinstance(layer, LoraLayer) or adapter not in layer.lora_A:
            continue
        dora = layer.lora_magnitude_vector
        found[name] = Update(
            _kept(layer.lora_A[adapter].weight),
            _kept(layer.lora_B[adapter].weight),
            float(layer.scaling[adapter]),
            _kept(dora[adapter].weight) if adapter in dora else None,
        )
    return found


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True)


@torch.no_grad()
def merge(network: nn.Module, updates: Updates, weight: float) -> None:
    """Add `weight` times the updates to a network's own weights."""
    layers = adaptable_layers(network)
    for name, update in updates.items():
        base: Any = layers[name].weight
        delta = weight * update.scale * (update.up.flatten(1) @ update.down.flatten(1))
        changed = base.float() + delta.view(base.shape).to(base.device)
        if update.magnitude is not None:
            lengths = changed.flatten(1).norm(dim=1)
            factors = update.magnitude.flatten().to(base.device) / lengths
            changed = changed * factors.view(-1, *[1] * (changed.ndim - 1))
        base.copy_(changed)


def put_on(network: Any, updates: Updates, adapter: str, weight: float = 1.0) -> None:
    """Add the updates, times `weight`, as an adapter of peft's: float32, and the only one that is active."""
    with torch.random.fork_rng(devices=[]):  # weights are drawn, and overwritten
        add_adapter(network, peft_config(updates), adapter)
    with torch.no_grad():
        for name, update in updates.items():
            layer = network.get_submodule(name)
            device = layer.lora_A[adapter].weight.device
            layer.lora_A[adapter].weight.data = update.down.to(device, copy=True)
            layer.lora_B[adapter].weight.data = update.up.to(device, copy=True)
            layer.scaling[adapter] = weight * update.scale
            if update.magnitude is not None:
                layer.lora_magnitude_vector[adapter].weight.data = update.magnitude.to(device, copy=True)


def peft_config(updates: Updates) -> LoraConfig:
    """peft's description of updates of any ranks and scales."""
    ranks = {name: update.rank for name, update in updates.items()}
    alphas = {name: update.scale * update.rank for name, update in updates.items()}
    rank, rank_pattern = _usual_and_others(ranks)
    alpha, alpha_pattern = _usual_and_others(alphas)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        target_modules=exactly(updates),
        use_dora=any(update.magnitude is not None for update in updates.values()),
    )


def _usual_and_others(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The value of most modules, and peft's patterns for the others: one for each value."""
    usual = Counter(values.values()).most_common(1)[0][0]
    others: dict[Any, list[str]] = {}
    for name, value in values.items():
        if value != usual:
            others.setdefault(value, []).append(name)
    return usual, {f"^(?:{exactly(names)})": value for value, names in others.items()}


def total(parts: Sequence[tuple[Updates, float]]) -> dict[str, Update]:
    """The sum of updates, each times its weight, as one of the sum of their ranks. It is exact; one DoRA stays itself.

    Raises:
        ValueError: a DoRA among others.
    """
    names = list(dict.fromkeys(name for updates, _ in parts for name in updates))
    summed = {}
    for name in names:
        own = [(updates[name], weight) for updates, weight in parts if name in updates]
        if len(own) == 1 and own[0][1] == 1:
            summed[name] = own[0][0]
            continue
        if any(update.magnitude is not None for update, _ in own):
            raise ValueError("a DoRA is not a sum")
        down = torch.cat([update.down for update, _ in own])
        up = torch.cat([weight * update.scale * update.up for update, weight in own], dim=1)
        summed[name] = Update(down, up, 1.0)
    return summed


def write_lora(
    folder: Path, pipeline: Any, networks: Mapping[str, Updates], configs: Mapping[str, Any]
) -> None:
    """Write `pytorch_lora_weights.safetensors` that `load_lora_weights` reads, adapter metadata (alpha) included.

    Args:
        pipeline: of the family that the adapters belong to.
        networks: the pipeline's name of each network -> its updates.
        configs: the same names -> peft's description of them.
    """
    arguments: dict[str, object] = {}
    for name, updates in networks.items():
        layers: dict[str, Tensor] = {}
        for module, update in updates.items():
            layers[f"{module}.lora_A.weight"], layers[f"{module}.lora_B.weight"] = update.down, update.up
            if update.magnitude is not None:
                ending = ".weight" if name.startswith("text_encoder") else ""  # which transformers wants
                layers[f"{module}.lora_magnitude_vector{ending}"] = update.magnitude
        if name != "transformer":  # diffusers' loaders take a transformer's layers under peft's own names
            renamed = convert_state_dict_to_diffusers(layers)
            mixed = name == "unet" and any(".lora_A." in key for key in renamed)  # which they do not read
            layers = layers if mixed else renamed
        arguments[f"{name}_lora_layers"] = layers
        arguments[f"{name}_lora_adapter_metadata"] = configs[name].to_dict()
    pipeline.save_lora_weights(str(folder), **arguments)
