"""The folder of a comparison as a cache: pictures and scores under keys of what they were made from.

    pictures/<key>/<prompt hash>-s<seed>.png    key: weights, sampler, resolution, precision, alignment
    pictures/<key>/checkpoint.json              what the key stands for
    pictures/<key>/cost.<rank>.jsonl            what pictures aligned at test time took
    pictures/<key>/metadata.jsonl               prompts and seeds, as `diffalign score` reads them
    scores/<label>-<key>.<rank>.jsonl           key: the reward, its options, its own code

A picture or score that is there is never made again, whichever comparison asked for it first. Files appear whole
(written beside their place and renamed) or line by line, so a killed comparison loses one batch at most.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.assets import resolve
from diffalign.config import RewardConfig
from diffalign.config.test_time import Alignment
from diffalign.errors import ConfigError, DataError, StorageError
from diffalign.picture_folder import METADATA, PictureSpec

KIND = "diffalign-comparison"
MARKER = "store.json"
OWN = {MARKER, "pictures", "scores", "distance", "comparison.json", "scores.jsonl", "grid.png"}
OWN |= {"report.html", "report.md", "study.json"}


class Store:
    """The pictures and scores below one folder.

    Args:
        path: new, empty, or the folder of an earlier comparison.

    Raises:
        ConfigError: it is a file, or holds something else.
        StorageError: it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_own(path)
        try:
            for part in ("pictures", "scores"):
                (path / part).mkdir(parents=True, exist_ok=True)
            if not (path / MARKER).exists():
                write_whole(path / MARKER, json.dumps({"kind": KIND, "format": 2}).encode())
        except OSError as error:
            raise _cannot_write(path, error) from error

    # Pictures

    def picture_file(self, key: str, spec: PictureSpec) -> str:
        """Where a picture is, relative to the store."""
        return f"pictures/{key}/{digest(spec.prompt)[:12]}-s{spec.seed}.png"

    def has_picture(self, key: str, spec: PictureSpec) -> bool:
        return (self.path / self.picture_file(key, spec)).exists()

    def save_picture(self, key: str, spec: PictureSpec, picture: Image.Image) -> None:
        """Raises StorageError."""
        file = self.path / self.picture_file(key, spec)
        partial = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            file.parent.mkdir(exist_ok=True)
            picture.save(partial, format="PNG")
            partial.replace(file)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise _cannot_write(file, error) from error

    def describe_pictures(self, key: str, origin: Mapping[str, Any], specs: Iterable[PictureSpec]) -> None:
        """Write checkpoint.json, and metadata.jsonl of these and all earlier pictures. Raises StorageError."""
        folder = self.path / "pictures" / key
        try:
            folder.mkdir(exist_ok=True)
            write_whole(folder / "checkpoint.json", _json(origin).encode())
            known = {line["file_name"]: line for line in read_lines(folder / METADATA)}
            for spec in specs:
                name = Path(self.picture_file(key, spec)).name
                known[name] = {"file_name": name, "prompt": spec.prompt, "seed": spec.seed}
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in known.values()]
            write_whole(folder / METADATA, "".join(lines).encode())
        except OSError as error:
            raise _cannot_write(folder, error) from error

    def add_cost(self, key: str, rank: int, cost: Mapping[str, float]) -> None:
        """Append what a batch of pictures took, alignment at test time included. Raises StorageError."""
        self._append(self.path / "pictures" / key / f"cost.{rank}.jsonl", [dict(cost)])

    def read_cost(self, key: str) -> dict[str, float]:
        """The sum of what was added for these pictures, by whatever process and in whatever comparison."""
        total: dict[str, float] = {}
        for file in sorted((self.path / "pictures" / key).glob("cost.*.jsonl")):
            for line in read_lines(file):
                total = {name: total.get(name, 0) + value for name, value in line.items()}
        return total

    # Scores

    def read_scores(self, name: str) -> dict[str, float]:
        """Picture file -> score, of everything scored under this name so far."""
        found = {}
        for file in sorted((self.path / "scores").glob(f"{name}.*.jsonl")):
            found.update({line["file"]: line["score"] for line in read_lines(file)})
        return found

    def add_scores(self, name: str, rank: int, scores: Mapping[str, float]) -> None:
        """Append scores of pictures; on disk when this returns. Raises StorageError."""
        lines = [{"file": picture, "score": score} for picture, score in scores.items()]
        self._append(self.path / "scores" / f"{name}.{rank}.jsonl", lines)

    def _append(self, file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
        try:
            _end_torn_line(file)
            with file.open("a", encoding="utf-8") as stream:
                stream.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise _cannot_write(file, error) from error


def picture_key(
    fingerprint: str,
    sampler: Mapping[str, Any],
    resolution: int | list[int],
    mixed_precision: str,
    alignment: Alignment | None = None,
) -> str:
    """What pictures depend on beside prompt and seed; `resolution` as `as_resolution` gives it."""
    parts: list[Any] = [fingerprint, dict(sampler), resolution, mixed_precision]
    if alignment is not None:
        rewards = [[reward_name(reward), reward.weight, reward.clip] for reward in alignment.rewards]
        parts += [alignment.method.model_dump(mode="json"), rewards]
    return digest(parts)[:16]


def reward_name(reward: RewardConfig) -> str:
    """The name of a reward's scores: its label, and a hash of name, options, own code and local weights."""
    file = Path(reward.name.rpartition(":")[0]).expanduser()
    is_file = file.suffix == ".py" and file.is_file()
    code = hashlib.sha256(file.read_bytes()).hexdigest() if is_file else None
    options = {name: [value, _stamps(value)] for name, value in reward.options.items()}
    readable = "".join(c if c.isalnum() else "-" for c in (reward.label or reward.name))[-40:].strip("-")
    return f"{readable}-{digest([reward.name, options, code])[:12]}"


def _stamps(value: Any) -> list[Any]:
    """Size and time of the local files that an option names (a checkpoint, say)."""
    if not isinstance(value, str) or not value:
        return []
    try:
        path = resolve(value)
        files = [path] if path.is_file() else sorted(path.glob("*"))
        return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    except (DataError, OSError, ValueError):
        return []


def digest(value: Any) -> str:
    """SHA-256, in hex, of a text or of JSON-safe data."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(file: Path, data: bytes) -> None:
    """Write a whole file or leave the old one."""
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_bytes(data)
    partial.replace(file)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; what a killed process left of its last one is passed over."""
    if not file.exists():
        return []
    lines = []
    for line in file.read_bytes().split(b"\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in lines if isinstance(line, dict)]


def _end_torn_line(file: Path) -> None:
    """After a crash in mid-line, the next line begins on its own."""
    if not file.exists() or not file.stat().st_size:
        return
    with file.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        if stream.read(1) != b"\n":
            stream.write(b"\n")


def _require_own(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", hint="name a folder for the results")
    if not path.is_dir() or not any(path.iterdir()):
        return
    foreign = sorted(entry.name for entry in path.iterdir() if entry.name.lstrip(".") not in OWN)
    if (path / MARKER).is_file() and not foreign:
        return
    raise ConfigError(
        f"the output folder {path} is not empty, and not a comparison",
        why=f"it holds {', '.join(foreign[:5])}" if foreign else f"{MARKER} is missing",
        hint="choose another --output-dir",
    )


def _cannot_write(where: Path, error: OSError) -> StorageError:
    return StorageError(
        "cannot write the comparison",
        where=str(where),
        why=error.strerror or str(error),
        hint="free some space or choose another --output-dir; what is there already is kept and used",
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
