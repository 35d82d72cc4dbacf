"""The files of a run: where they are, how they are written, what a new or resumed run may find."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffalign.config import AnyRun
from diffalign.config_file import dump_config
from diffalign.errors import ConfigError, StorageError


class RunFolder:
    """One run: config.yaml, metrics.jsonl, samples/, checkpoints/, final/, summary.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.summary = path / "summary.json"

    def check(self, config: AnyRun, *, resume: bool) -> None:
        """Whether a new run may start here, or the run to resume was started with this configuration.

        Raises:
            ConfigError: the folder is taken, there is nothing to resume, or the configuration differs.
        """
        if resume:
            self._check_same_config(dump_config(config))
            return
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise ConfigError(
                f"the output folder {self.path} is not empty",
                hint="add --resume to continue that run, or choose another --output-dir",
            )

    def create(self, config: AnyRun) -> None:
        """Make the folder and write config.yaml; a resumed run keeps its own. Raises StorageError."""
        try:
            self.samples.mkdir(parents=True, exist_ok=True)
            if not self.config.exists():
                write_atomically(self.config, dump_config(config))
        except OSError as error:
            raise StorageError(
                "cannot create the run's folder",
                where=str(self.path),
                why=str(error),
                hint="choose another --output-dir",
            ) from error

    def _check_same_config(self, text: str) -> None:
        if not self.config.is_file():
            raise ConfigError(
                f"there is no run to resume in {self.path}",
                where=str(self.config),
                hint="leave --resume out to start one, or name the folder of an earlier run",
            )
        old, new = self.config.read_text(encoding="utf-8").splitlines(), text.splitlines()
        if old == new:
            return
        changed = [f"- {line.strip()}" for line in old if line not in new]
        changed += [f"+ {line.strip()}" for line in new if line not in old]
        raise ConfigError(
            f"the configuration is not the one that {self.path} was started with",
            why="\n".join(changed[:12]),
            hint="resume with the run's own config.yaml, or start a new run in another folder",
        )

    def require_space(self, needed: int) -> None:
        """Raise StorageError unless `needed` bytes are free where the run is written."""
        place = self.path.resolve()
        while not place.exists():
            place = place.parent
        free = shutil.disk_usage(place).free
        if free < needed:
            raise StorageError(
                f"not enough disk space for this run: {_gigabytes(needed)} needed, {_gigabytes(free)} free",
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

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def drop_metrics_after(self, iteration: int) -> None:
        """Forget lines that a resumed run will write again."""
        if not self.metrics.exists():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        write_atomically(self.metrics, "".join(kept))


def write_atomically(file: Path, text: str) -> None:
    """Write a whole text file or leave the old one."""
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
