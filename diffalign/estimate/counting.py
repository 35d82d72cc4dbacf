"""What PyTorch allocates and computes while a piece of code runs, on the meta device too, where nothing is real."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Cost:
    """Of one piece of work.

    Args:
        peak: most bytes at once beyond what was there before.
        flops: of matrix products, convolutions and attention; a multiplication and an addition are two.
    """

    peak: int = 0
    flops: int = 0


class Counter(TorchDispatchMode):
    """Inside it, every storage that an operation makes counts from then until nothing refers to it any more.

    Also those that autograd keeps for the backward pass. A storage counts once, whatever views there are of it.

    Args:
        given: tensors that were there before, and do not count.

    Attributes:
        now, peak: bytes.
        flops: see `Cost`.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._live: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._known: dict[Any, Any] = {}  # blocks repeat, and the meta device takes its time
        for tensor in given:
            self._note(tensor.untyped_storage(), 0)

    @property
    def cost(self) -> Cost:
        """What was counted so far."""
        return Cost(self.peak, self.flops)

    def _note(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        if key in self._live:
            return

        def gone(_: object) -> None:
            if self._live.pop(key, None) is not None:
                self.now -= size

        self._live[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key = _signature(function, args, kwargs)
        known = None if key is None else self._known.get(key)
        if known is None:
            out = function(*args, **kwargs)
            formula = flop_registry.get(function._overloadpacket)
            flops = 0 if formula is None else int(formula(*args, **kwargs, out_val=out))
            if key is not None and isinstance(out, Tensor) and not _shares(out, args):
                self._known[key] = (out.shape, out.stride(), out.dtype, flops)
        else:
            shape, stride, dtype, flops = known
            out = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        self.flops += flops
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._note(storage, storage.nbytes())
        return out


def _signature(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What the result of a plain operation on meta tensors depends on; None for views, changes in place and others."""
    schema = function._schema
    if schema.is_mutable or len(schema.returns) != 1 or schema.returns[0].alias_info is not None:
        return None
    values: list[Any] = [function]
    for value in (*args, *kwargs.items()):
        if isinstance(value, Tensor):
            if value.device.type != "meta":
                return None
            values.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, list):
            if any(isinstance(part, Tensor) for part in value):
                return None
            values.append(tuple(value))
        else:
            values.append((type(value), value))
    try:
        hash(result := tuple(values))
    except TypeError:
        return None
    return result if any(isinstance(value, Tensor) for value in args) else None


def _shares(out: Tensor, args: tuple[Any, ...]) -> bool:
    storage = out.untyped_storage()._cdata
    return any(isinstance(value, Tensor) and value.untyped_storage()._cdata == storage for value in args)


def weights_of(*networks: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]


def stored_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind them, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
