"""Two real iterations, where there are weights to take them with."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from diffalign.config import Run, TrackingConfig
from diffalign.errors import ConfigError
from diffalign.estimate.architecture import Configuration
from diffalign.training.run import align

ITERATIONS = 2


@dataclass(frozen=True)
class Measured:
    """`seconds` of the second iteration, the first being slower; `peak` bytes, allocated on the GPU, or resident."""

    seconds: float
    peak: int
    device: str


def measure(config: Run) -> Measured:
    """Run two iterations of `config` in a folder that is removed afterwards, without evaluation.

    Raises:
        ConfigError: the checkpoint has no weights.
        DiffalignError: whatever the run itself meets.
    """
    if not Configuration(config.model).has_weights:
        raise ConfigError(
            f"--measure: {config.model.path} has configuration files only",
            why="real steps need weights",
            hint="leave --measure out, and give --gpu or --tflops for the time",
        )
    training = config.training.model_copy(
        update={
            "iterations": ITERATIONS,
            "checkpoint_every": ITERATIONS,
            "preview_every": 0,
            "keep_best": None,
        }
    )
    evaluation = config.evaluation.model_copy(update={"sets": {}})
    short = config.model_copy(
        update={"training": training, "evaluation": evaluation, "tracking": TrackingConfig()}
    )
    with tempfile.TemporaryDirectory(prefix="diffalign-estimate-") as folder:
        summary = align(short, Path(folder) / "run")
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = map(json.loads, lines)  # before the first iteration, one of validation may stand there
    done = {record["iteration"]: record["seconds"] for record in records if "seconds" in record}
    if ITERATIONS not in done:
        raise ConfigError(
            "--measure: the run ended before its second iteration", why=str(summary.get("ended_early"))
        )
    seconds = done[ITERATIONS] - done[ITERATIONS - 1]
    return Measured(seconds, int(summary["peak_memory_bytes"]), str(summary["device"]))
