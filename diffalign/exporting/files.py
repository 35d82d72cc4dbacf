"""Safetensors files of an export: cast, checked, with a header; and a new header for one that is there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import NumericsError
from diffalign.origins import read_header

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def write_tensors(
    file: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, header: dict[str, str]
) -> None:
    """Write one file; floating tensors become `dtype`, but for the scalars of alpha.

    Raises:
        NumericsError: a weight that is too large for `dtype`.
    """
    ready: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach()
        if value.is_floating_point() and value.ndim:
            value = value.to(dtype)
            require_finite([(name, value)], dtype)
        value = value.contiguous()
        ready[name] = value.clone() if value.data_ptr() in places else value  # tied weights are written twice
        places.add(ready[name].data_ptr())
    save_file(ready, file, metadata=header)


def require_finite(tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Raise NumericsError for a tensor that is not finite."""
    for name, value in tensors:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NumericsError(
                f"--dtype {str(dtype).removeprefix('torch.')}: a weight is not finite in it",
                where=name,
                hint="use --dtype bfloat16, which has the range of float32"
                if dtype == torch.float16
                else "the run's weights are damaged: export an earlier checkpoint",
            )


def stamp(file: Path, header: Mapping[str, str]) -> None:
    """Add `header` to that of a safetensors file. Its tensors are copied as they are, without being loaded."""
    found = read_header(file)
    found["__metadata__"] = {**found.get("__metadata__", {}), **header}
    text = json.dumps(found).encode()
    text += b" " * (-len(text) % 8)
    partial = file.with_name(f".{file.name}.partial")
    with file.open("rb") as source, partial.open("wb") as target:
        source.seek(8 + int.from_bytes(source.read(8), "little"))
        target.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(source, target, 1 << 24)
    partial.replace(file)
