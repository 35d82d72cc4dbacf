"""Where an export goes: a new place, or that of an earlier export; written beside it and moved there at the end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffalign.errors import ConfigError, StorageError
from diffalign.origins import read_header
from diffalign.result_folder import result_folder
from diffalign.training.storage import fsync

MARK = "export.json"
"""In every exported folder: what it is and where it came from."""
OURS = "diffalign.version"
"""In the header of every exported file."""


def check_target(path: Path, *, is_file: bool, overwrite: bool) -> None:
    """Raise ConfigError unless an export may be written at `path`."""
    if is_file and path.suffix != ".safetensors":
        raise ConfigError(
            f"--output: {path} is not named .safetensors",
            why="this format is one safetensors file",
            hint=f"--output {path.with_name(path.name + '.safetensors')}",
        )
    if not path.exists() or (not is_file and path.is_dir() and not any(path.iterdir())):
        return
    if not _is_export(path, is_file):
        raise ConfigError(
            f"{path} exists, and is no export of this kind",
            why="only what `diffalign export` wrote is ever replaced",
            hint="choose another --output, or remove it first",
        )
    if not overwrite:
        raise ConfigError(
            f"{path} exists", hint="add --overwrite to replace that export, or choose another --output"
        )


@contextmanager
def target_file(path: Path) -> Iterator[Path]:
    """Yield a place beside the checked `path`; what is there at the end becomes `path`, or nothing is left.

    Raises:
        StorageError: the disk refused.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            fsync(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def target_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside the checked `path`; at the end it becomes `path`, or nothing is left.

    Raises:
        StorageError: the disk refused.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with result_folder(path, may_replace=lambda folder: _is_export(folder, is_file=False)) as folder:
            yield folder


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it, a disk that is full or refuses is a StorageError, whichever library met it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise StorageError(
            "cannot write the export",
            where=str(path),
            why=str(error),
            hint="free some space, or choose another --output",
        ) from error


def _is_export(path: Path, is_file: bool) -> bool:
    if is_file:
        return path.is_file() and OURS in read_header(path).get("__metadata__", {})
    return path.is_dir() and (path / MARK).is_file()
