"""Frozen networks that lie on the CPU and compute elsewhere, with copies of their weights for as long as needed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def on_device(networks: Iterable[nn.Module], device: torch.device, *, lent: bool) -> Iterator[None]:
    """Within it, frozen networks have their weights and buffers on `device`; afterwards the very tensors from before.

    The network's own tensors never move: copies stand in for them, so that nothing is copied back. A result with
    gradient keeps the copies that its backward pass needs, until it is freed itself.

    Args:
        networks: frozen (the copies are not given back to an optimizer).
        lent: False does nothing, for networks that live on `device`.
    """
    if not lent:
        yield
        return
    own: list[tuple[nn.Module, str, Tensor]] = []
    copies: dict[Tensor, Tensor] = {}  # tied weights stay one tensor
    try:
        for module in {module for network in networks for module in network.modules()}:
            tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            for name, tensor in tensors:
                if tensor not in copies:
                    copies[tensor] = _copy(tensor, device)
                own.append((module, name, tensor))
                setattr(module, name, copies[tensor])
        yield
    finally:
        for module, name, tensor in own:
            setattr(module, name, tensor)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().to(device)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy
