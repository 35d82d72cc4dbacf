"""Memory and speed of devices."""

from __future__ import annotations

import os
import re
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from diffalign.errors import ConfigError

GIB = 2**30
CUDA_CONTEXT = GIB // 2
"""What a process has on a GPU besides tensors. PyTorch measured 287 MB for the context, with kernels loaded when needed
(github.com/pytorch/pytorch/pull/86509); kernels and workspaces come on top. A round figure, not measured."""
UTILISATION = 0.35
"""Share of a card's dense half-precision rate that training is assumed to reach. An assumption, printed as one."""


@dataclass(frozen=True)
class Card:
    """A GPU: memory in GiB, and dense bf16 tensor TFLOP/s with float32 accumulation, from NVIDIA's data sheets."""

    memory: float
    tflops: float


CARDS = {
    "rtx3090": Card(24, 71),
    "rtx4090": Card(24, 165),
    "rtx5090": Card(32, 210),
    "l4": Card(24, 121),
    "l40s": Card(48, 362),
    "a6000": Card(48, 155),
    "a100-40gb": Card(40, 312),
    "a100-80gb": Card(80, 312),
    "h100": Card(80, 989),
    "h200": Card(141, 989),
}
"""Name -> card. The nominal memory: a driver keeps a little of it."""


def card(name: str) -> Card:
    """The card of that name, whatever its case and separators. Raises ConfigError with the names there are."""
    plain = {known.replace("-", ""): found for known, found in CARDS.items()}
    found = plain.get(re.sub(r"[^a-z0-9]", "", name.lower()))
    if found is None:
        raise ConfigError(
            f"--gpu: {name} is not in the table",
            why=f"there are {', '.join(CARDS)}",
            hint="give --memory and --tflops instead",
        )
    return found


def parse_memory(text: str) -> int:
    """Bytes of `24GiB`, `24 GB` or `8000MiB`. Raises ConfigError."""
    units = {"gib": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if found is None or found[2] not in units or not float(found[1]):
        raise ConfigError(
            f"--memory: {text!r} is no amount of memory", hint="write it as 24GiB, 24GB or 8000MiB"
        )
    return int(float(found[1]) * units[found[2]])


def memory_here(kind: str) -> tuple[int, str] | None:
    """Bytes of the first GPU, or of free RAM, and in words where they are from; None where that cannot be told."""
    if kind == "cuda":
        if not torch.cuda.is_available():
            return None
        found = torch.cuda.get_device_properties(0)
        return int(found.total_memory), f"all of {found.name}"
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        return free, "free RAM of this machine"
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
    return int(total), "RAM of this machine, in use or not"


def resident_bytes() -> int:
    """What this process holds: Python and the libraries, where nothing else was loaded."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
