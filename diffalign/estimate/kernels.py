"""What a device would do in place of the meta device: its attention, its normalisations, its autocast.

The meta device has no kernels of its own: attention there is the textbook one, which keeps every score, and autocast
does not exist. Both decide how much memory a training step needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

DeviceKind = Literal["cuda", "cpu"]
LOWERED: frozenset[Any] = frozenset(
    {
        *(F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, torch.einsum),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
        F.scaled_dot_product_attention,
    }
)
"""What autocast computes in half precision, among what these networks call: AT_FORALL_LOWER_PRECISION_FP of PyTorch's
autocast_mode.h, on the CPU alike."""
RAISED: frozenset[Any] = frozenset(
    {
        *(F.layer_norm, F.group_norm, F.rms_norm, F.softmax, F.log_softmax, F.softplus, F.mse_loss),
        *(torch.softmax, torch.exp, torch.pow, torch.rsqrt, torch.reciprocal, torch.sum, torch.cumsum),
        *(Tensor.softmax, Tensor.exp, Tensor.pow, Tensor.rsqrt, Tensor.reciprocal, Tensor.sum, Tensor.cumsum),
        *(Tensor.__pow__, F.interpolate),
    }
)
"""What autocast on a GPU computes in float32: AT_FORALL_FP32 and AT_FORALL_FP32_SET_OPT_DTYPE there."""


class Kernels(TorchFunctionMode):
    """Attention that keeps its inputs, output and one number a row, and normalisations that keep their input."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        replaced = _REPLACED.get(function)
        if replaced is None:
            return function(*args, **(kwargs or {}))
        return replaced(*args, **(kwargs or {}))


class Autocast(TorchFunctionMode):
    """`torch.autocast` of a device, for tensors of the meta device.

    Copies of trained float32 weights are kept until the end, as autocast's cache does.
    """

    def __init__(self, kind: DeviceKind, dtype: torch.dtype) -> None:
        super().__init__()
        self.kind, self.dtype = kind, dtype
        self._copies: dict[int, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        cast: Callable[[Any], Any] | None = None
        if function in LOWERED:
            cast = self._lowered
        elif self.kind == "cuda" and function in RAISED:
            cast = _raised
        if cast is None:
            return function(*args, **kwargs)
        return function(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    def __exit__(self, *reasons: Any) -> None:
        self._copies.clear()
        super().__exit__(*reasons)

    def _lowered(self, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._lowered, value))
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad and value.dtype == torch.float32):
            return value.to(self.dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(self.dtype)
        return self._copies[id(value)]


def autocast(kind: DeviceKind, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """`Autocast`, or nothing for float32."""
    return nullcontext() if dtype == torch.float32 else Autocast(kind, dtype)


def recompute_in(kind: DeviceKind, dtype: torch.dtype) -> Callable[..., Any]:
    """What diffusers calls for a checkpointed block; the second pass is in the same precision as the first."""

    def call(block: Callable[..., Any], *args: Any) -> Any:
        def inside(*given: Any) -> Any:
            with Kernels(), autocast(kind, dtype):
                return block(*given)

        return checkpoint(inside, *args, use_reentrant=False, preserve_rng_state=False)

    return call


def _raised(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _attention(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    """Of flash attention and of the memory-efficient kernel alike: [B, H, L, D]."""
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    return found


class _Normalised(torch.autograd.Function):
    """Keeps the input and two float32 numbers for each of `groups` per row, as the native kernels do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int) -> Tensor:
        statistics = torch.empty(2, groups, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, statistics)
        ctx.has_bias = bias is not None
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight, _ = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        return (
            torch.empty_like(x) if to_x else None,
            torch.empty_like(weight) if to_weight else None,
            torch.empty_like(weight) if to_bias and ctx.has_bias else None,
            None,
        )


def _group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    found: Tensor = _Normalised.apply(x, weight, bias, len(x) * num_groups)
    return found


def _layer_norm(
    x: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    found: Tensor = _Normalised.apply(x, weight, bias, x.shape[:-1].numel())
    return found


def _is_true(value: Tensor) -> bool:
    """The masks of prompts are asked whether they leave out anything; here no prompt is padded."""
    return True if value.device.type == "meta" else bool(value)


def _indexed(values: Tensor, index: Any) -> Tensor:
    """A mask of the meta device keeps everything."""
    masked = isinstance(index, Tensor) and index.dtype == torch.bool and index.device.type == "meta"
    return values if masked else values[index]


_REPLACED: dict[Any, Callable[..., Any]] = {
    Tensor.__bool__: _is_true,
    Tensor.__getitem__: _indexed,
    F.scaled_dot_product_attention: _attention,
    F.group_norm: _group_norm,
    F.layer_norm: _layer_norm,
}
