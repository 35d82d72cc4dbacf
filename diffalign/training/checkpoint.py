"""Checkpoints that survive a crash: safetensors and JSON, a manifest with hashes, written last, then renamed.

A folder `step-N` exists only when it is whole. Reading verifies every hash: a flipped bit in a safetensors file
loads without complaint otherwise.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import CheckpointError, StorageError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds: named groups of tensors, and JSON-safe state."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def write_checkpoint(folder: Path, iteration: int, snapshot: Snapshot, *, keep_last: int) -> Path:
    """Write `folder/step-<iteration>` whole or not at all, then remove all but the newest `keep_last`.

    Raises:
        StorageError: the disk refused; older checkpoints are untouched.
    """
    final = folder / f"step-{iteration}"
    partial = folder / f".step-{iteration}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for group, tensors in snapshot.tensors.items():
            contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
            save_file(contiguous, partial / f"{group}.safetensors")
        (partial / "state.json").write_text(json.dumps(snapshot.state, allow_nan=False), encoding="utf-8")
        files = {file.name: _fingerprint(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"files": files}, indent=1), encoding="utf-8")
        for file in partial.iterdir():
            _fsync(file)
        _fsync(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _fsync(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(
            f"cannot write the checkpoint of iteration {iteration}",
            where=str(final),
            why=str(error),
            hint="free some space and continue with --resume; older checkpoints are untouched",
        ) from error
    for old in list_checkpoints(folder)[:-keep_last]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_checkpoint(path: Path) -> Snapshot:
    """Load and verify one checkpoint.

    Raises:
        CheckpointError: a file is missing, truncated or changed; the message names it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        for name, expected in manifest["files"].items():
            if _fingerprint(path / name) != expected:
                raise CheckpointError(
                    f"{path / name} is not what was written",
                    why="its size or SHA-256 differs from the manifest: the file is damaged",
                    hint="remove this checkpoint folder and resume from an older one",
                )
        tensors = {
            Path(name).stem: load_file(path / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        }
        return Snapshot(tensors, json.loads((path / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}",
            why=str(error),
            hint="remove this checkpoint folder and resume from an older one",
        ) from error


def _fingerprint(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
