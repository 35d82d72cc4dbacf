"""What a run folder says about itself, read without torch; whatever is missing or torn becomes a `Hole`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.assets import resolve
from diffalign.errors import DataError
from diffalign.layout import FINAL


@dataclass(frozen=True)
class Hole:
    """A number that does not exist, and why."""

    where: str
    reason: str

    def to_json(self) -> dict[str, str]:
        return {"where": self.where, "reason": self.reason}


@dataclass(frozen=True)
class RunInfo:
    """A training run as its config.yaml states it; unreadable parts are None or empty."""

    folder: Path
    method: str | None
    """`algorithm.name`."""
    base_model: str | None
    """`model.path`: where training started from."""
    seed: int | None
    weights: dict[str, float]
    """Reward label -> weight; 0 only watches, a negative one minimises."""
    is_online: bool
    """It samples pictures and learns from their rewards; SFT and DPO see no reward."""

    @property
    def training_rewards(self) -> list[str]:
        """Labels that training optimised: online RL's with a weight."""
        return [label for label, weight in self.weights.items() if weight] if self.is_online else []

    @property
    def watched_rewards(self) -> list[str]:
        """Labels that online RL logged and did not optimise."""
        return [label for label, weight in self.weights.items() if not weight] if self.is_online else []

    @property
    def minimised(self) -> frozenset[str]:
        """Training rewards that were to fall."""
        return frozenset(label for label in self.training_rewards if self.weights[label] < 0)

    def to_json(self) -> dict[str, Any]:
        """As a comparison's checkpoint names its run."""
        return {
            "folder": str(self.folder),
            "method": self.method,
            "training_rewards": self.training_rewards,
            "seed": self.seed,
        }


def find_run(path: str) -> Path | None:
    """The run folder that a checkpoint is the result of: the folder itself, or the one around its `final/`.

    None for a hub id, a bundled model, a pipeline folder, and a checkpoint in the middle of a run.
    """
    try:
        folder = resolve(path)
    except DataError:
        return None
    run = folder.resolve().parent if folder.resolve().name == FINAL else folder
    known = any((run / name).is_file() for name in ("config.yaml", "summary.json"))
    return run if known else None


def find_base_run(run: Path, base_model: str) -> Path | None:
    """The run that `run` started from, or None if it started from a model.

    A relative path was relative to where training was started: it is looked for from each folder around the run,
    the nearest first, and from the working folder last.
    """
    if Path(base_model).expanduser().is_absolute() or ":" in base_model:
        return find_run(base_model)
    for place in [*run.resolve().parents, Path.cwd()]:
        found = find_run(str(place / base_model))
        if found is not None:
            return found
    return None


def read_run(folder: Path) -> RunInfo:
    """What config.yaml says, as far as it can be read."""
    import yaml

    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        tree = None
    method, base_model = _at(tree, "algorithm", "name"), _at(tree, "model", "path")
    seed, rewards = _at(tree, "seed"), _at(tree, "rewards")
    weights: dict[str, float] = {}
    for reward in rewards if isinstance(rewards, list) else []:
        label, weight = _at(reward, "label") or _at(reward, "name"), number(_at(reward, "weight"))
        if label is not None and weight is not None:
            weights[str(label)] = weight
    return RunInfo(
        folder,
        None if method is None else str(method),
        None if base_model is None else str(base_model),
        seed if isinstance(seed, int) else None,
        weights,
        is_online=_at(tree, "sampler") is not None,
    )


def read_summary(folder: Path) -> tuple[dict[str, Any], None] | tuple[None, str]:
    """summary.json, or the reason why there is none."""
    file = folder / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None, f"no summary.json in {folder}: the run has not finished"
    except (OSError, ValueError) as error:
        return None, f"{file} cannot be read: {error}"
    if not isinstance(summary, dict):
        return None, f"{file} is not a run's summary"
    return summary, None


def number(value: object) -> float | None:
    """A finite number as it was read, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value


def _at(tree: object, *keys: str) -> Any:
    """The value below nested keys, None where a key is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
