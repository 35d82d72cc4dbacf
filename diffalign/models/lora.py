"""LoRA adapters on the UNet and text encoder: added in float32, exported with their alpha.

The adapter starts as the identity (B = 0), so a fresh policy equals its reference exactly.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from diffalign.config import LoRAConfig
from diffalign.errors import ConfigError
from diffalign.seeding import derive_seed

TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def add_lora(network: Any, config: LoRAConfig, targets: list[str], seed: int) -> None:
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
        network.add_adapter(LoraConfig(r=config.rank, lora_alpha=alpha, target_modules=targets))
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def export_lora(folder: Path, unet: nn.Module, text_encoder: nn.Module | None) -> None:
    """Write `pytorch_lora_weights.safetensors` that `load_lora_weights` reads, adapter metadata (alpha) included."""
    layers, metadata = _adapter(unet)
    text_layers, text_metadata = _adapter(text_encoder) if text_encoder is not None else (None, None)
    StableDiffusionPipeline.save_lora_weights(
        str(folder),
        unet_lora_layers=layers,
        text_encoder_lora_layers=text_layers,
        unet_lora_adapter_metadata=metadata,
        text_encoder_lora_adapter_metadata=text_metadata,
    )


def _adapter(network: Any) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(network))
    return layers, network.peft_config["default"].to_dict()
