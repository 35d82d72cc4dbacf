"""A frozen denoising network in 8 or 4 bits, under LoRA: the linear layers of its blocks, which hold most of it.

A quantised weight is dequantised in the forward pass and once more in the backward pass, so that autograd never keeps
it in full; in between, a product is what it is without quantisation, in sampling and in training alike (the
importance ratio of a policy gradient stays 1). bitsandbytes' and torchao's own layers are not used: the former take
other kernels without gradient than with it, the latter keep the dequantised weights for the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import DeviceError, first_line

Quantization = Literal["int8", "nf4"]
NF4_BLOCK = 64
"""Weights that share a scale, as in QLoRA."""


class QuantizedLinear(nn.Linear):
    """A frozen `nn.Linear` whose weight is int8 with one scale a row, or NF4 with one a block of 64.

    `weight` is int8: [out, in], or two NF4 numbers a byte. `scale` is float32. The bias stays as it was.

    int8: w is stored as round(w / s), s = max |row| / 127. nf4: the 16 quantiles of a normal distribution (Dettmers et
    al. 2023, arXiv:2305.14314), without double quantisation: 4.5 bits a weight.
    """

    def __init__(self, layer: nn.Linear, kind: Quantization, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        weight = layer.weight.detach().to(device)
        stored, scale = _to_int8(weight) if kind == "int8" else _to_nf4(weight)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.scale = nn.Buffer(scale)
        self.bias = layer.bias

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in floating point."""
        if self.kind == "int8":
            return (self.weight * self.scale).to(dtype)
        return _from_nf4(self.weight, self.scale, (self.out_features, self.in_features), dtype)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out], computed and returned in autocast's type, or else in the input's."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        product: Tensor = _Product.apply(input.to(dtype), self)
        return product if self.bias is None else product + self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """x w^T with a frozen w that is not kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


def quantize(network: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Replace the linear layers of a frozen network's blocks, one after the other, each on `device`.

    Raises:
        DeviceError: nf4 without bitsandbytes.
    """
    if kind == "nf4":
        require_bitsandbytes("model.quantization: nf4")
    for parent, name in list(_linear_layers(network)):  # by name: a layer that is done must not be held
        setattr(parent, name, QuantizedLinear(getattr(parent, name), kind, device))


def _linear_layers(network: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """(parent, its name there) of each linear layer in a list of blocks; embeddings and output layers are in none."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    for parent in dict.fromkeys(module for blocks in lists for module in blocks.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                yield parent, name


def require_bitsandbytes(option: str) -> Any:
    """The module. Raises DeviceError, which says how to install it for `option`."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise DeviceError(
            f"{option} needs bitsandbytes",
            why=first_line(error),
            hint="pip install 'diffalign[quantization]'",
        ) from error
    return bitsandbytes


def _to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, 1.0)
    return (weight / scale).round().to(torch.int8), scale


def _to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=NF4_BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return packed.view(torch.int8), state.absmax


def _from_nf4(packed: Tensor, scale: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(scale, shape=torch.Size(shape), dtype=dtype, blocksize=NF4_BLOCK, quant_type="nf4")
    weight: Tensor = dequantize_4bit(packed.view(torch.uint8), state)
    return weight
