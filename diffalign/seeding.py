"""Random numbers as functions of counters.

Nothing in a run draws from a global stream: data order, noise and timesteps of step n come from generators
seeded by (seed, purpose, n, ...), so a resumed run repeats the uninterrupted one bit for bit, and a picture
does not depend on its batch. Numbers are drawn on the CPU, so that devices agree.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(seed: int, *keys: int | str) -> int:
    """A 63-bit seed that depends on every key (blake2b), stable across processes and versions."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator for one purpose, e.g. `generator(seed, "timesteps", step, rank)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *keys))


def sample_noise(shape: Sequence[int], seeds: Sequence[int], *keys: int | str) -> Tensor:
    """Standard normal noise [len(seeds), *shape], float32 on the CPU; row i depends on seeds[i] and keys only."""
    return torch.stack([torch.randn(tuple(shape), generator=generator(seed, *keys)) for seed in seeds])
