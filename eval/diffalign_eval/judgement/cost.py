"""What a checkpoint cost: read from the summary.json of its run and of the runs that it started from.

Nothing is estimated. A number that a summary lacks is None with a hole that says why; a sum over several runs exists
only if every one of them tells its part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.cli.alignment_args import split_negative
from diffalign.errors import DataError
from diffalign_eval.judgement.run_files import find_base_run, find_run, number, read_run, read_summary

MEASURING = ("evaluation", "validation")
"""Phases that measure and do not train: they are listed, and are no part of `Cost.seconds`."""
COUNTS = {
    "pictures_sampled": "sampled_pictures",
    "pictures_trained": "training_pictures",
    "reward_queries": "reward_queries",
    "preference_labels": "preference_labels",
    "captions": "captions",
}
"""Field of `Cost` -> name in the summary's `counts`."""
UNITS = {
    "per_minute": ("seconds", 60.0, "no training time"),
    "per_1000_pictures": ("pictures_sampled", 1000.0, "no pictures were sampled"),
    "per_1000_queries": ("reward_queries", 1000.0, "no reward was asked"),
    "per_1000_labels": ("preference_labels", 1000.0, "no preference labels were used"),
}
"""Field of `GainPerUnit` -> (field of `Cost`, its size, what it means if that is 0)."""


@dataclass(frozen=True)
class Gain:
    """An improvement over the baseline, positive where the checkpoint is better."""

    set: str
    reward: str
    gain: float


@dataclass(frozen=True)
class GainPerUnit:
    """A gain divided by what it cost; None where there is nothing to divide by."""

    set: str
    reward: str
    gain: float
    per_minute: float | None
    per_1000_pictures: float | None
    per_1000_queries: float | None
    per_1000_labels: float | None


@dataclass(frozen=True)
class Cost:
    """What the runs behind a checkpoint used, all stages together. None: not known, `holes` say why."""

    checkpoint: str
    stages: tuple[str, ...] = ()
    """Methods, the first stage first."""
    device: str | None = None
    """Several devices are listed once each."""
    seconds: float | None = None
    """Wall time of training, start and checkpoints included, the phases of `MEASURING` not."""
    device_seconds: float | None = None
    """`seconds` times processes, by stage: GPU seconds, or CPU seconds where each process has one thread."""
    phases: dict[str, float] | None = None
    """Wall seconds by phase, in the first process."""
    processes: int | None = None
    """The most that a stage had."""
    pictures_sampled: int | None = None
    """For training; those of evaluations are not counted."""
    pictures_trained: int | None = None
    """(Picture, noise level) pairs that the loss saw."""
    reward_queries: int | None = None
    """Scores of one picture by one reward during training."""
    preference_labels: int | None = None
    """Labelled pairs that training saw, each once."""
    captions: int | None = None
    """Captioned pictures that training saw, each once."""
    peak_memory_bytes: int | None = None
    """The largest of the stages, in the first process: allocated on the GPU, or resident."""
    energy_joules: float | None = None
    """What the GPUs drew during the whole runs, evaluations included."""
    per_unit: tuple[GainPerUnit, ...] = ()
    holes: tuple[str, ...] = ()

    def with_gains(self, gains: Sequence[Gain]) -> Cost:
        """This cost with every gain per minute, per 1,000 pictures, queries and labels."""
        divisors: dict[str, float | None] = {}
        holes = list(self.holes)
        for name, (field, size, nothing) in UNITS.items():
            spent = getattr(self, field)
            divisors[name] = spent / size if spent else None
            if gains and spent is None:
                holes.append(f"gain {name}: {field} not known")
            elif gains and not spent:
                holes.append(f"gain {name}: {nothing}")
        per_unit = tuple(
            GainPerUnit(
                gain.set,
                gain.reward,
                gain.gain,
                **{name: gain.gain / unit if unit else None for name, unit in divisors.items()},
            )
            for gain in gains
        )
        return replace(self, per_unit=per_unit, holes=tuple(holes))

    def to_json(self) -> dict[str, Any]:
        """As the `cost` of a comparison lists it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return fields | {
            "stages": list(self.stages),
            "phases": self.phases or {},
            "per_unit": [vars(gain).copy() for gain in self.per_unit],
            "holes": list(self.holes),
        }


def cost_of(checkpoint: str, path: str) -> Cost:
    """The cost of the runs behind the checkpoint at `path`; a checkpoint of no run gives a cost of holes.

    Args:
        checkpoint: its name in the comparison.
        path: a run folder, a run's `final/`, or anything else that can be compared; of CHECKPOINT+negative:PATH, the
            runs behind both count.

    Raises:
        DataError: the runs start from each other in a circle.
    """
    runs = [run for part in split_negative(path) if part is not None and (run := find_run(part)) is not None]
    if not runs:
        return Cost(checkpoint, holes=(f"cost: {path} is not the result of a training run",))
    folders = dict.fromkeys(folder for run in runs for folder in run_chain(run))
    return _add_up(checkpoint, [_Stage.read(folder) for folder in folders])


def run_chain(run: Path) -> list[Path]:
    """The run and the runs it started from, the first stage first.

    Raises:
        DataError: they start from each other in a circle.
    """
    chain = [run.resolve()]
    while True:
        base_model = read_run(chain[-1]).base_model
        if base_model is None:
            summary, _ = read_summary(chain[-1])
            base_model = (summary or {}).get("base_model")
        before = find_base_run(chain[-1], base_model) if isinstance(base_model, str) else None
        if before is None:
            return chain[::-1]
        if before.resolve() in chain:
            circle = [*chain[chain.index(before.resolve()) :], before.resolve()]
            raise DataError(
                "the runs behind a checkpoint start from each other, so their cost cannot be added up",
                where=" <- ".join(map(str, circle)),
                why="model.path in config.yaml of each is the one to its right",
                hint="a run was replaced after another had started from it: compare a copy of its final/ instead",
            )
        chain.append(before.resolve())


@dataclass(frozen=True)
class _Stage:
    """One run's summary as numbers, None where it lacks one; `reason`: there is no summary at all."""

    name: str
    folder: Path
    reason: str | None
    device: str | None
    processes: int | None
    seconds: float | None
    phases: dict[str, float] | None
    counts: dict[str, int | None]
    peak_memory: float | None
    energy: float | None
    energy_reason: str

    @classmethod
    def read(cls, folder: Path) -> _Stage:
        summary, reason = read_summary(folder)
        found = summary or {}
        phases = _numbers(found.get("seconds_by_phase"))
        wall, processes = number(found.get("wall_seconds")), number(found.get("processes"))
        seconds = None
        if wall is not None and phases is not None:
            seconds = max(0.0, wall - sum(phases.get(name, 0.0) for name in MEASURING))
        counts = _numbers(found.get("counts")) or {}
        why = found.get("energy_reason")
        return cls(
            name=str(found.get("algorithm") or read_run(folder).method or folder.name),
            folder=folder,
            reason=reason,
            device=found.get("device") if isinstance(found.get("device"), str) else None,
            processes=None if processes is None else int(processes),
            seconds=seconds,
            phases=phases,
            counts={field: _whole(counts.get(name)) for field, name in COUNTS.items()},
            peak_memory=number(found.get("peak_memory_bytes")),
            energy=number(found.get("energy_joules")),
            energy_reason=why if isinstance(why, str) else "its summary.json does not say",
        )


def _add_up(checkpoint: str, stages: Sequence[_Stage]) -> Cost:
    holes = [f"cost of {stage.name}: {stage.reason}" for stage in stages if stage.reason is not None]
    finished = not holes

    def known(values: Iterable[float | None], what: str) -> list[float] | None:
        """All stages' values, or None and a hole that names the stages without one."""
        listed = list(values)
        lacking = [stage.name for stage, value in zip(stages, listed, strict=True) if value is None]
        if not lacking:
            return [value for value in listed if value is not None]
        if finished:
            holes.append(f"{what}: summary.json of {', '.join(lacking)} does not say")
        return None

    seconds = known((stage.seconds for stage in stages), "seconds")
    processes = known((stage.processes for stage in stages), "processes")
    memory = known((stage.peak_memory for stage in stages), "peak_memory_bytes")
    counts: dict[str, int | None] = {}
    for field in COUNTS:
        used = known((stage.counts[field] for stage in stages), field)
        counts[field] = None if used is None else int(sum(used))
    if finished:
        holes += [
            f"energy of {stage.name}: {stage.energy_reason}" for stage in stages if stage.energy is None
        ]
    energies = [stage.energy for stage in stages if stage.energy is not None]
    devices = [stage.device for stage in stages]
    return Cost(
        checkpoint,
        stages=tuple(stage.name for stage in stages),
        device=", ".join(dict.fromkeys(name for name in devices if name)) if all(devices) else None,
        seconds=None if seconds is None else sum(seconds),
        device_seconds=_product(seconds, processes),
        phases=_merged([stage.phases for stage in stages]),
        processes=None if processes is None else int(max(processes)),
        pictures_sampled=counts["pictures_sampled"],
        pictures_trained=counts["pictures_trained"],
        reward_queries=counts["reward_queries"],
        preference_labels=counts["preference_labels"],
        captions=counts["captions"],
        peak_memory_bytes=None if memory is None else int(max(memory)),
        energy_joules=sum(energies) if len(energies) == len(stages) else None,
        holes=tuple(dict.fromkeys(holes)),
    )


def _product(seconds: list[float] | None, processes: list[float] | None) -> float | None:
    if seconds is None or processes is None:
        return None
    return sum(time * count for time, count in zip(seconds, processes, strict=True))


def _merged(stages: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    """Seconds by phase of all stages, or None if one of them does not tell."""
    merged: dict[str, float] = {}
    for phases in stages:
        if phases is None:
            return None
        for name, seconds in phases.items():
            merged[name] = merged.get(name, 0.0) + seconds
    return merged


def _numbers(values: object) -> dict[str, float] | None:
    if not isinstance(values, dict):
        return None
    read = {str(name): number(value) for name, value in values.items()}
    return {name: value for name, value in read.items() if value is not None}


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
