"""A folder of results that is complete or not there: written beside its place, moved there at the end."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffalign.errors import ConfigError, StorageError


@contextmanager
def result_folder(path: Path, may_replace: Callable[[Path], bool] = lambda _: False) -> Iterator[Path]:
    """Yield an empty folder next to `path`; it becomes `path` if the block ends well, else nothing is left.

    Args:
        path: where the results shall be; it must not exist, be empty, or be what `may_replace` accepts.
        may_replace: told of an occupied folder; True lets the new results take its place.

    Raises:
        ConfigError: `path` is a file, or occupied by something else.
        StorageError: the folder cannot be made.
    """
    path = path.expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{path} is a file", hint="name a folder for the results")
    if path.is_dir() and any(path.iterdir()) and not may_replace(path):
        raise ConfigError(
            f"the output folder {path} is not empty",
            why="its files would be mixed with the new ones, or lost",
            hint="choose another --output-dir, or remove the folder first",
        )
    staging, old = (path.with_name(f".{path.name}.{use}-{os.getpid()}") for use in ("partial", "old"))
    try:
        staging.mkdir(parents=True)
    except OSError as error:
        raise StorageError(
            f"cannot write to {path.parent}", why=error.strerror, hint="choose another --output-dir"
        ) from error
    try:
        yield staging
        if path.exists():
            path.rename(old)
        staging.rename(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        for left_over in (staging, old):
            shutil.rmtree(left_over, ignore_errors=True)
