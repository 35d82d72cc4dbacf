"""What every loss returns, and the checks every loss makes."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LossOutput:
    """A scalar float32 loss and detached scalar metrics of the same batch."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


def require_same_shape(**tensors: Tensor) -> None:
    """Raise ValueError, naming each shape, unless all tensors have one shape."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError("shapes differ: " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()))
