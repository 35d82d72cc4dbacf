"""Results on disk: Parquet or JSON Lines by the name's ending, complete or not there."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.errors import ConfigError, StorageError

SUFFIXES = (".parquet", ".jsonl")


def require_output(path: Path, option: str, suffixes: Sequence[str]) -> None:
    """Said before the scoring, not after it.

    Raises:
        ConfigError: a name with another ending.
        StorageError: a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise StorageError(f"{option} is a folder, not a file", where=str(path))
    if path.suffix.lower() not in suffixes:
        raise ConfigError(f"{option} must end in {' or '.join(suffixes)}; got {path.name}")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write {option}: its folder is missing or read-only", where=str(path))


def write_columns(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """A table of columns of one length, as Parquet or as one JSON object a line; StorageError if it cannot be."""
    if path.suffix.lower() == ".parquet":
        write_whole(path, lambda file: _write_parquet(file, columns))
        return
    rows = zip(*columns.values(), strict=True)
    lines = (json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) for row in rows)
    write_whole(path, lambda file: _write_lines(file, lines))


def write_text(path: Path, text: str) -> None:
    """A text file, whole or not at all; StorageError if it cannot be."""
    write_whole(path, lambda file: _write_lines(file, [text]))


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """`write(file)` beside `path`, then renamed over it.

    Raises:
        StorageError: it cannot be written; an older file is as it was.
    """
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            dir=path.absolute().parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise StorageError("cannot write the scores", where=str(path), why=str(error)) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _write_lines(file: Path, lines: Iterable[str]) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(f"{line}\n" for line in lines)


def _write_parquet(file: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {name: pa.string() for name in ("file", "prompt", "skipped")} | {"pair": pa.int64()}
    arrays = {name: pa.array(values, types.get(name, pa.float64())) for name, values in columns.items()}
    pq.write_table(pa.table(arrays), file)
