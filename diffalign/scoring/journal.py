"""Scores on disk while a run goes on: one line a picture, appended and flushed, so that nothing is lost.

The first line says which rewards and which pictures the scores belong to. A picture is known by a key made of its
name, its prompt and the stamp of its file: one that has changed since has another key, and is scored again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign import __version__
from diffalign.config import RewardConfig
from diffalign.errors import ConfigError, StorageError
from diffalign.scoring.sources import PictureSource

KIND = "diffalign score, partial"


def journal_path(output: Path) -> Path:
    """`scores.parquet` -> `scores.parquet.partial.jsonl`, in the same folder."""
    return output.with_name(f"{output.name}.partial.jsonl")


def journal_header(pictures: PictureSource, specs: Sequence[RewardConfig]) -> dict[str, Any]:
    """What must be the same for scores to be used again: the set of pictures, rewards, options, own code."""
    return {
        "kind": KIND,
        "diffalign": __version__,
        "input": pictures.where,
        "rewards": [{"name": spec.name, "options": spec.options, "code": _code(spec.name)} for spec in specs],
    }


def picture_keys(pictures: PictureSource, prompts: Sequence[str | None]) -> list[str]:
    """One key a picture, from its name, prompt and stamp."""
    return [
        hashlib.blake2b(
            json.dumps([file, prompt, pictures.stamp(index)]).encode(), digest_size=16
        ).hexdigest()
        for index, (file, prompt) in enumerate(zip(pictures.files, prompts, strict=True))
    ]


class Journal:
    """Scores by picture key, and the file that holds them; the file appears with the first scores.

    Args:
        path: of an earlier run's file, or of the one to be written.
        header: of this run (`journal_header`).

    Raises:
        ConfigError: the file belongs to other rewards or pictures; nothing is changed.
        StorageError: it cannot be read or written, or it is damaged before its last line.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path = path
        self.scores: dict[str, list[float]] = {}
        self._header = json.loads(json.dumps(header, default=str))
        if path.exists():
            self._read()

    def append(self, rows: Sequence[tuple[str, str, Sequence[float]]]) -> None:
        """(key, file, one score a reward) of pictures just scored; on disk when this returns."""
        lines = [{"key": key, "file": file, "scores": list(scores)} for key, file, scores in rows]
        try:
            new = not self.path.exists()
            with self.path.open("a", encoding="utf-8") as file:
                for line in [self._header] * new + lines:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise StorageError("cannot write the scores", where=str(self.path), why=error.strerror) from error
        self.scores.update({key: list(scores) for key, _, scores in rows})

    def remove(self) -> None:
        """Once the scores are where they belong."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        try:
            data = self.path.read_bytes()
            whole = data.rfind(b"\n") + 1  # a killed run may leave half a line
            if whole < len(data):
                with self.path.open("r+b") as file:
                    file.truncate(whole)
            if not whole:
                self.path.unlink()
                return
        except OSError as error:
            raise StorageError(
                "cannot read the scores of an earlier run", where=str(self.path), why=error.strerror
            ) from error
        try:
            header, *lines = [json.loads(line) for line in data[:whole].splitlines()]
            self.scores = {line["key"]: line["scores"] for line in lines}
        except (ValueError, TypeError, KeyError) as error:
            raise StorageError(
                "the scores of an earlier run are damaged",
                where=str(self.path),
                hint="remove the file to score everything anew",
            ) from error
        self._require_same(header)

    def _require_same(self, header: Any) -> None:
        if header == self._header:
            return
        if not isinstance(header, dict) or header.get("kind") != KIND:
            raise ConfigError(
                f"{self.path} is no file of partial scores",
                why="diffalign score keeps its scores there while it runs",
                hint="choose another --output, or move the file away",
            )
        different = [name for name in self._header if header.get(name) != self._header[name]]
        raise ConfigError(
            f"an unfinished run with another {' and '.join(different)} has left its scores there",
            where=str(self.path),
            why="\n".join(
                f"{name} then: {_short(header.get(name))}, now: {_short(self._header[name])}"
                for name in different
            ),
            hint="give the same command to finish that run, remove the file to start anew,\n"
            "or choose another --output",
        )


def _short(value: Any) -> str:
    """A header's value on one line; the rewards by name, options and the beginning of their code's hash."""
    if not isinstance(value, list):
        return str(value)
    parts = []
    for reward in value:
        notes = [f"{key}={option}" for key, option in reward["options"].items()]
        notes += [f"code {reward['code'][:8]}"] if reward["code"] else []
        parts.append(reward["name"] + (f" ({', '.join(notes)})" if notes else ""))
    return ", ".join(parts)


def _code(name: str) -> str | None:
    """Hash of the file of a reward given as file.py:function."""
    file = Path(name.rpartition(":")[0]).expanduser()
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" and file.is_file() else None
