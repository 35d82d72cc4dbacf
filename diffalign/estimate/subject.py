"""The policy of a run on the meta device: the real networks, of which only sizes are known."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.config import Run
from diffalign.errors import CheckpointError, DiffalignError, first_line
from diffalign.estimate.architecture import META, Configuration, family_and_pipeline
from diffalign.estimate.kernels import DeviceKind, Kernels, autocast, recompute_in
from diffalign.models.base import Conditioning
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.loading import COMPUTE_DTYPES
from diffalign.models.quantization import NF4_BLOCK, QuantizedLinear, quantize

PROMPT = "a prompt"


class _OnMeta:
    """What differs in a family whose networks are on the meta device; see `subject`."""

    kind: DeviceKind
    compute_dtype: torch.dtype

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.kind, self.compute_dtype)


class _MetaQuantizedLinear(QuantizedLinear):
    """A quantised layer in its stored size; `QuantizedLinear` cannot ask the meta device for its autocast."""

    compute_dtype: torch.dtype = torch.float32

    def forward(self, input: Tensor) -> Tensor:
        product: Tensor = _MetaProduct.apply(input.to(self.compute_dtype), self)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        first = torch.float32 if self.kind == "int8" else dtype
        return torch.empty(self.out_features, self.in_features, dtype=first, device=META).to(dtype)


class _MetaProduct(torch.autograd.Function):
    """x w^T, without w being kept for the backward pass, as in `models.quantization`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: _MetaQuantizedLinear) -> Tensor:
        ctx.layer = layer
        return x @ layer.dequantized(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] @ ctx.layer.dequantized(gradients[0].dtype), None


def subject(config: Run, kind: DeviceKind) -> DiffusersDenoiser:
    """The trainable denoiser of `config` on the meta device, as it would be on a device of this kind.

    Raises:
        CheckpointError: see `architecture`. ConfigError: options that this checkpoint cannot have.
    """
    model, training = config.model, config.training
    family, pipeline = family_and_pipeline(model, Configuration(model))
    shadow: Any = type(family.__name__, (_OnMeta, family), {"kind": kind})
    # Where networks wait, and how they are stored, is accounted for apart: on the meta device nothing moves.
    here: dict[str, Any] = {
        "offload_text_encoders": False,
        "offload_vae": False,
        "quantization": None,
        "adapters": [],
    }
    dtype = COMPUTE_DTYPES[training.mixed_precision]
    if model.quantization is not None:
        _quantize(getattr(pipeline, family.network_name), model.quantization, dtype)
    denoiser: DiffusersDenoiser = shadow(
        pipeline,
        model.model_copy(update=here),
        device=META,
        compute_dtype=dtype,
        channels_last=training.channels_last,
        trainable=True,
        seed=config.seed,
    )
    if training.gradient_checkpointing:
        denoiser.network.enable_gradient_checkpointing(recompute_in(kind, dtype))
    return denoiser


def _quantize(network: nn.Module, how: Any, dtype: torch.dtype) -> None:
    """`quantize`, on the meta device: the int8 layers have the right shapes; those of nf4 are made smaller."""
    network.requires_grad_(False).to(dtype)
    quantize(network, "int8", META)
    layers: list[Any] = [module for module in network.modules() if isinstance(module, QuantizedLinear)]
    for layer in layers:
        layer.__class__ = _MetaQuantizedLinear
        layer.compute_dtype, layer.kind = dtype, how
        if how == "nf4":
            count = layer.in_features * layer.out_features
            stored = torch.empty(-(-count // 2), 1, dtype=torch.int8, device=META)
            layer.weight = nn.Parameter(stored, requires_grad=False)
            layer.scale = nn.Buffer(torch.empty(-(-count // NF4_BLOCK), device=META))


def prompt_rows(denoiser: DiffusersDenoiser, rows: int) -> Mapping[str, Tensor]:
    """What `rows` encoded prompts are, by name. Raises CheckpointError for encoders that shapes are not enough for."""
    try:
        with torch.no_grad(), Kernels():
            return denoiser._encode([PROMPT] * rows)
    except DiffalignError:
        raise
    except Exception as error:  # a network that looks at values, which the meta device does not have
        raise CheckpointError(
            f"the text encoders of {denoiser.config.path} cannot be followed by shapes alone",
            why=f"{type(error).__name__}: {first_line(error)}",
            hint="train for two iterations and read peak_memory_bytes in summary.json",
        ) from error


def conditioning(rows: Mapping[str, Tensor], count: int) -> Conditioning:
    """`count` prompts like the one whose rows are given, allocated now."""
    given = {name: torch.empty_like(value[:1].expand(count, *value.shape[1:]), memory_format=torch.contiguous_format)
             for name, value in rows.items()}  # fmt: skip
    without = {name: value[:1] for name, value in rows.items()}
    return Conditioning(given.pop("embeddings"), without.pop("embeddings"), given, without)
