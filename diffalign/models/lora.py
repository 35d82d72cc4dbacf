"""LoRA adapters on the denoising network and text encoders: added in float32, exported with their alpha.

The adapter starts as the identity (B = 0), so a fresh policy equals its reference exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from diffalign.config import LoRAConfig
from diffalign.errors import ConfigError
from diffalign.seeding import derive_seed

TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The attention of a CLIP text encoder."""


def add_lora(network: Any, config: LoRAConfig, targets: Sequence[str], seed: int) -> None:
    """Add a trainable float32 adapter to every module whose name ends in one of `targets`.

    Raises:
        ConfigError: no module matches; the message lists the linear layers that exist.
    """
    kinds = (nn.Linear, nn.Conv2d)
    linear = sorted({name.split(".", 1)[-1] for name, m in network.named_modules() if isinstance(m, kinds)})
    matched = [
        name
        for name, _ in network.named_modules()
        if any(name == t or name.endswith("." + t) for t in targets)
    ]
    if not matched:
        endings = sorted(
            {name.rsplit(".", 1)[-1] for name in linear if not name.rsplit(".", 1)[-1].isdigit()}
        )
        raise ConfigError(
            f"model.lora.target_modules: no module of {type(network).__name__} matches {', '.join(targets)}",
            why="an adapter that matches nothing would train nothing",
            hint=f"module names end in: {', '.join(endings)}",
        )
    alpha = config.alpha if config.alpha is not None else config.rank
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "lora", type(network).__name__))
        network.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=list(targets)))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export_lora(folder: Path, pipeline: Any, networks: Mapping[str, Any]) -> None:
    """Write `pytorch_lora_weights.safetensors` that `load_lora_weights` reads, adapter metadata (alpha) included.

    Args:
        pipeline: of the family that the adapters belong to.
        networks: the pipeline's name of each adapted network -> the network.
    """
    arguments: dict[str, object] = {}
    for name, network in networks.items():
        layers = get_peft_model_state_dict(network)
        if name != "transformer":  # diffusers' loaders take a transformer's layers under peft's own names
            layers = convert_state_dict_to_diffusers(layers)
        arguments[f"{name}_lora_layers"] = layers
        arguments[f"{name}_lora_adapter_metadata"] = network.peft_config["default"].to_dict()
    pipeline.save_lora_weights(str(folder), **arguments)
