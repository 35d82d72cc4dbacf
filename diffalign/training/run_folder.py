"""The files of a run: where they are, how they are written, what a new or resumed run may find."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.config import Run
from diffalign.config_file import dump_config
from diffalign.errors import ConfigError, StorageError
from diffalign.layout import FINAL
from diffalign.redaction import redact
from diffalign.training.storage import free_bytes, gigabytes, patiently


class RunFolder:
    """One run: config.yaml, metrics.jsonl, samples/, checkpoints/, final/, summary.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.final = path / FINAL
        self.summary = path / "summary.json"
        self.faults = path / "faults"

    def resumes(self, resume: str | Path) -> bool:
        """Whether a run goes on here (or a new one starts), by `resume`: auto, must, never or a checkpoint.

        Raises:
            ConfigError: the folder is taken, or there is nothing to resume.
        """
        there = self.config.is_file()
        if resume == "never" or (resume == "auto" and not there):
            if self.path.exists() and (not self.path.is_dir() or self._is_used()):
                raise ConfigError(
                    f"the output folder {self.path} is not empty",
                    hint="leave --resume never out to continue that run, or choose another --output-dir"
                    if there
                    else "choose another --output-dir",
                )
            return False
        if not there:
            raise ConfigError(
                f"there is no run to resume in {self.path}",
                where=str(self.config),
                hint="leave --resume out to start one, or name the folder of an earlier run",
            )
        return True

    def _is_used(self) -> bool:
        """Whether anything is in it but what a run leaves that is killed in its first moment."""
        return any(path.name != f".{self.config.name}.partial" for path in self.path.iterdir())

    def create(self, config: Run) -> None:
        """Make the folder and write config.yaml; a resumed run keeps its own. Raises StorageError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.exists():
                write_atomically(self.config, dump_config(config))
            self.samples.mkdir(exist_ok=True)
        except OSError as error:
            raise StorageError(
                "cannot create the run's folder",
                where=str(self.path),
                why=str(error),
                hint="choose another --output-dir",
            ) from error

    def replace_config(self, config: Run) -> None:
        """What the run goes on with; what it was started with is kept as config.1.yaml, config.2.yaml, ..."""
        number = 1
        while (old := self.path / f"config.{number}.yaml").exists():
            number += 1
        write_atomically(old, self.config.read_text(encoding="utf-8"))
        write_atomically(self.config, dump_config(config))

    def require_space(self, needed: int) -> None:
        """Raise StorageError unless `needed` bytes are free where the run is written."""
        free = free_bytes(self.path)
        if free < needed:
            raise StorageError(
                f"not enough disk space for this run: {gigabytes(needed)} needed, {gigabytes(free)} free",
                where=str(self.path.resolve()),
                why="a checkpoint holds the trainable weights, two moments each and their average; final/ the result",
                hint="free some space, lower training.keep_last, or choose an --output-dir on another disk",
            )

    def write_final(self, export: Callable[[Path], None]) -> None:
        """Let `export` write final/, whole or not at all."""
        partial = self.final.with_name(".final.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            export(partial)
            shutil.rmtree(self.final, ignore_errors=True)
            partial.rename(self.final)
        except OSError as error:
            raise StorageError(
                "cannot write the result",
                where=str(self.final),
                why=str(error),
                hint="free some space and continue with --resume: the last checkpoint is whole",
            ) from error

    def append_metrics(self, record: dict[str, Any], patience: float = 0.0) -> None:
        """Add one line to metrics.jsonl, trying for `patience` seconds."""
        size = self.metrics.stat().st_size if self.metrics.exists() else 0

        def append() -> None:
            with self.metrics.open("a", encoding="utf-8") as stream:
                stream.truncate(size)  # what a failed attempt left
                stream.write(redact(json.dumps(record)) + "\n")

        patiently(append, patience)

    def read_metrics(self) -> list[dict[str, float]]:
        """The whole lines of metrics.jsonl so far."""
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def drop_metrics_after(self, iteration: int) -> None:
        """Forget lines that a resumed run will write again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        write_atomically(self.metrics, "".join(kept))


def write_atomically(file: Path, text: str) -> None:
    """Write a whole text file, without secrets, or leave the old one."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(redact(text))
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
