"""The optimizer of a run: AdamW, with its moments in float32 or in 8 bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from diffalign.config import TrainingConfig
from diffalign.models.quantization import require_bitsandbytes


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW over float32 `parameters`, which live on `device`.

    adamw8bit (Dettmers et al. 2022, arXiv:2110.02861) works in the order in which a weight lies in memory, so that
    every one is made contiguous.

    Raises:
        DeviceError: adamw8bit without bitsandbytes.
    """
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": config.adam_betas,
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, **options, fused=device.type == "cuda")
    bitsandbytes = require_bitsandbytes("training.optimizer: adamw8bit")
    for parameter in parameters:
        parameter.data = parameter.data.contiguous()
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, **options)
    return optimizer
