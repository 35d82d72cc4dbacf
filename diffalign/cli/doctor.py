"""Check versions, device, precision, disk, caches, bundled files and a reward.

Every line is ok, warn or FAIL, with what to do about it. The exit code is 0 unless something fails.

examples:
  diffalign doctor
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Literal

from diffalign.assets import assets_dir, list_configs
from diffalign.errors import DiffalignError

_GB = 1e9
_LIBRARIES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "diffusers": "diffusers",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "open_clip": "open_clip_torch",
}
_BUNDLED = ("tiny-sd", "clip", "clip/aesthetic.safetensors", "pairs.parquet", "images.parquet", "prompts")
_SMOKE_SIDE = 64


@dataclass(frozen=True)
class Args:
    pass


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Literal["ok", "warn", "FAIL"]
    subject: str
    detail: str
    advice: str = ""

    def __str__(self) -> str:
        line = f"{self.status:<5} {self.subject:<20} {self.detail}"
        return f"{line}\n{'':<26} -> {self.advice}" if self.advice else line


def run(args: Args) -> None:
    """Prints the report.

    Raises:
        DiffalignError: something failed, after all of it was printed.
    """
    failed = []
    for finding in examine():
        print(finding, flush=True)
        if finding.status == "FAIL":
            failed.append(finding.subject)
    if failed:
        hint = "follow the advice after each ->"
        raise DiffalignError(f"{len(failed)} checks failed: {', '.join(failed)}", hint=hint)


def examine() -> Iterator[Finding]:
    """All checks, cheap ones first. A check that breaks is a finding, not an exception."""
    checks: list[Callable[[], Iterator[Finding]]] = [_versions, _device, _disk, _cache, _bundled, _rewards]
    for check in checks:
        try:
            yield from check()
        except Exception as error:
            what = error.what if isinstance(error, DiffalignError) else f"{type(error).__name__}: {error}"
            hint = getattr(error, "hint", None) or "reinstall: pip install --upgrade diffalign"
            yield Finding("FAIL", check.__name__.strip("_"), what, hint)


def _versions() -> Iterator[Finding]:
    supported = sys.version_info[:2] >= (3, 11)
    advice = "" if supported else "use Python 3.11 or newer"
    yield Finding("ok" if supported else "FAIL", "python", platform.python_version(), advice)
    for module, distribution in _LIBRARIES.items():
        try:
            version = metadata.version(distribution)
            import_module(module)
        except (ImportError, metadata.PackageNotFoundError, RuntimeError) as error:
            yield Finding(
                "FAIL", module, f"does not import: {error}", f"pip install --upgrade {distribution}"
            )
        else:
            yield Finding("ok", module, version)


def _device() -> Iterator[Finding]:
    import torch

    memory = _memory_gb()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cpu", f"{cores} cores, {f'{memory:.1f} GB' if memory else 'unknown'} memory")
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU-only torch"
        driver = "an NVIDIA driver is installed" if shutil.which("nvidia-smi") else "no NVIDIA driver found"
        yield Finding(
            "warn",
            "gpu",
            f"none that torch can use ({built}; {driver})",
            "the bundled checkpoint trains on the CPU; Stable Diffusion 1.5 and up needs a GPU",
        )
        yield Finding(
            "ok", "precision", "training.mixed_precision no: on a CPU float32 is the fastest and exact"
        )
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        capability = f"compute capability {card.major}.{card.minor}"
        detail = f"{card.name}, {card.total_memory / _GB:.1f} GB, {capability}, CUDA {torch.version.cuda}"
        yield Finding("ok", f"gpu {index}", detail)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        advice = "bf16: this GPU supports it, with float32's range (no loss scaling)"
    else:
        advice = "fp16: this GPU has no bf16; gradients are scaled, and the VAE stays float32"
    yield Finding("ok", "precision", f"training.mixed_precision {advice}")


def _memory_gb() -> float | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GB
    except (AttributeError, OSError, ValueError):
        return None


def _disk() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / _GB
    detail = f"{free:.1f} GB free in {here}"
    if not os.access(here, os.W_OK):
        yield Finding(
            "FAIL", "disk", f"{here} cannot be written", "run from a folder you own, or use --output-dir"
        )
    elif free < 1:
        yield Finding("FAIL", "disk", detail, "free some space; even a tiny run needs some hundred MB")
    elif free < 20:
        yield Finding(
            "warn", "disk", detail, "enough for LoRA runs; a full Stable Diffusion checkpoint takes 4 GB"
        )
    else:
        yield Finding("ok", "disk", detail)


def _cache() -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE

    cache = Path(HF_HUB_CACHE)
    size = sum(file.lstat().st_size for file in cache.rglob("*") if file.is_file() and not file.is_symlink())
    offline = ", offline (HF_HUB_OFFLINE)" if HF_HUB_OFFLINE else ""
    detail = f"{cache}: {size / _GB:.1f} GB{offline}" if cache.is_dir() else f"{cache}: empty{offline}"
    yield Finding("ok", "hub cache", detail)


def _bundled() -> Iterator[Finding]:
    missing = [name for name in _BUNDLED if not (assets_dir() / name).exists()]
    detail = f"{len(_BUNDLED) - len(missing)} of {len(_BUNDLED)} in {assets_dir()}"
    if missing:
        advice = "reinstall diffalign; quickstart and tiny/* need them"
        yield Finding("FAIL", "bundled", f"{detail}; missing: {', '.join(missing)}", advice)
    else:
        yield Finding("ok", "bundled", detail)
    configs = list_configs()
    yield Finding(
        "ok" if configs else "FAIL", "configs", f"{len(configs)} run files", "" if configs else "reinstall"
    )


def _rewards() -> Iterator[Finding]:
    yield _smoke("jpeg_compressibility")
    if (assets_dir() / "clip").is_dir():
        yield _smoke("clip", checkpoint="bundled:clip")
    else:
        yield Finding("warn", "clip", "not tried", "the bundled CLIP is missing")


def _smoke(name: str, **options: str) -> Finding:
    """Scores one generated picture (a red disc on white)."""
    import torch

    from diffalign.rewards import load_reward

    axis = torch.linspace(-1, 1, _SMOKE_SIDE)
    outside = (axis[:, None] ** 2 + axis[None, :] ** 2 > 0.4).float()
    picture = torch.stack([torch.ones_like(outside), outside, outside])[None]
    try:
        score = load_reward(name, **options)(picture, ["a red circle"]).item()
    except DiffalignError as error:
        return Finding("FAIL", name, error.what, error.hint or error.why or "")
    return Finding("ok", name, f"{score:.3f} for a generated picture")
