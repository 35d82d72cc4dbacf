"""Devices and processes, through Accelerate."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffalign.models.loading import pick_device


class Processes:
    """This process among all that `accelerate launch` started (usually one).

    Args:
        device: "auto", "cpu" or "cuda".

    Raises:
        DeviceError: CUDA was asked for and is absent.
    """

    def __init__(self, device: str) -> None:
        wanted = pick_device(device)
        self.accelerator = Accelerator(cpu=wanted.type == "cpu")
        self.device: torch.device = self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenation over all processes, in rank order."""
        return self.accelerator.gather(tensor) if self.world > 1 else tensor

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean gradient over all processes, in place; a parameter without gradient counts as zero."""
        if self.world == 1:
            return
        trained = list(parameters)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = self.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), reduction="mean")
        for parameter, mean in zip(trained, flat.split([grad.numel() for grad in grads]), strict=True):
            parameter.grad = mean.view_as(parameter).clone(memory_format=torch.preserve_format)

    def wait(self) -> None:
        """Until every process is here."""
        self.accelerator.wait_for_everyone()
