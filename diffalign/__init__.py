"""diffalign: align diffusion models by SFT, preference optimisation and online RL.

Importing this package loads neither torch nor diffusers; each name below is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "Denoiser": "diffalign.models.base",
    "NoiseSchedule": "diffalign.schedule",
    "Sampler": "diffalign.transitions",
    "Trajectory": "diffalign.trajectory",
    "align": "diffalign.training.run",
    "load_config": "diffalign.config_file",
    "load_denoiser": "diffalign.models.loading",
    "load_reward": "diffalign.rewards",
    "rollout": "diffalign.trajectory",
}

__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
