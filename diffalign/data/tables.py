"""Tables with pictures in them: text columns in memory, pictures one row group at a time.

A Parquet set of millions of pictures is never in memory: `cells` reads the row group that holds the row and
keeps the latest ones up to a number of bytes. Reading rows in order is fast; random order reads one group per
row, so sets that are visited often want small row groups (about 100 rows) or cached latents.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from diffalign.data.inside import inside
from diffalign.data.textfiles import json_lines, require_file
from diffalign.errors import DataError, first_line

CACHE_BYTES = 512 * 2**20
"""Row groups kept in memory by one table; the latest is kept whatever its size."""

MAX_GROUP_BYTES = 2 * 2**30
"""A row group whose pictures take more than this is refused: reading one row would need all of it."""


class Table(Protocol):
    """Rows with named columns; `columns` are those present."""

    columns: list[str]
    folder: Path

    def __len__(self) -> int: ...

    def column(self, name: str) -> list[Any]:
        """A whole column (text or numbers; not pictures)."""

    def cells(self, row: int, names: Sequence[str]) -> tuple[Any, ...]:
        """Some cells of one row."""

    def where(self, row: int) -> str:
        """File and row (counting from 0) or line, for error messages."""


def open_table(path: Path) -> Table:
    """A .parquet file, several by pattern (`folder/train-*.parquet`), or a .jsonl file."""
    if path.suffix == ".parquet":
        return ParquetTable(path)
    if path.suffix == ".jsonl":
        return JsonTable(path)
    require_file(path)
    raise DataError(
        "unknown table format",
        where=str(path),
        hint="use a .parquet file, a pattern such as data/train-*.parquet, or a .jsonl file",
    )


class JsonTable:
    """A .jsonl file of objects, in memory; pictures are paths relative to its folder."""

    def __init__(self, file: Path) -> None:
        self.folder = file.parent
        self._wheres: list[str] = []
        self._rows: list[dict[str, Any]] = []
        for where, value in json_lines(file):
            if not isinstance(value, dict):
                raise DataError("line is not a JSON object", where=where, hint='write {"key": value, ...}')
            self._wheres.append(where)
            self._rows.append(value)
        if not self._rows:
            raise DataError("no rows", where=str(file), why="the file is empty, or has only blank lines")
        self.columns = list(self._rows[0])

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, name: str) -> list[Any]:
        return [self.cells(row, (name,))[0] for row in range(len(self))]

    def cells(self, row: int, names: Sequence[str]) -> tuple[Any, ...]:
        try:
            return tuple(self._rows[row][name] for name in names)
        except KeyError as error:
            raise DataError(
                f"no key {error.args[0]}", where=self.where(row), why=f"found: {', '.join(self._rows[row])}"
            ) from error

    def where(self, row: int) -> str:
        return self._wheres[row]


@dataclass(frozen=True)
class _RowGroup:
    file: Path
    index: int
    first_row: int
    first_row_of_file: int


class ParquetTable:
    """One or more Parquet files of the same columns, read lazily.

    Args:
        path: a file, or a pattern in the last part (`data/train-*.parquet`, in name order).
        cache_bytes: row groups kept in memory.
    """

    def __init__(self, path: Path, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.folder = path.parent
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[int, tuple[str, ...]], Any] = OrderedDict()
        self._metadata: dict[Path, Any] = {}
        self._groups: list[_RowGroup] = []
        self.columns: list[str] = []
        self._rows = 0
        for file in _matching(path):
            self._add(file)
        if not self._rows:
            raise DataError("no rows", where=str(path))
        self._starts = [group.first_row for group in self._groups]

    def __len__(self) -> int:
        return self._rows

    def column(self, name: str) -> list[Any]:
        values: list[Any] = []
        for file, metadata in self._metadata.items():
            try:
                with pq.ParquetFile(file, metadata=metadata) as parquet:
                    values += parquet.read(columns=[name]).column(name).to_pylist()
            except (pa.ArrowException, OSError, ValueError) as error:
                raise _damaged(f"{file}, column {name}", error) from error
        return values

    def cells(self, row: int, names: Sequence[str]) -> tuple[Any, ...]:
        if not 0 <= row < self._rows:
            raise IndexError(f"row {row} of {self._rows}")
        position = bisect.bisect_right(self._starts, row) - 1
        group = self._read(position, tuple(names))
        offset = row - self._starts[position]
        return tuple(group.column(name)[offset].as_py() for name in names)

    def where(self, row: int) -> str:
        group = self._groups[bisect.bisect_right(self._starts, row) - 1]
        return f"{group.file}, row {row - group.first_row_of_file}"

    def _add(self, file: Path) -> None:
        try:
            with pq.ParquetFile(file) as parquet:
                metadata, columns = parquet.metadata, parquet.schema_arrow.names
        except (pa.ArrowException, OSError) as error:
            raise _damaged(str(file), error) from error
        if self._metadata and columns != self.columns:
            raise DataError(
                "Parquet files of one set differ in their columns",
                where=str(file),
                why=f"{', '.join(columns)}\nin {next(iter(self._metadata))}: {', '.join(self.columns)}",
            )
        self.columns = columns
        self._metadata[file] = metadata
        first_row_of_file = self._rows
        for index in range(metadata.num_row_groups):
            self._groups.append(_RowGroup(file, index, self._rows, first_row_of_file))
            self._rows += metadata.row_group(index).num_rows

    def _read(self, position: int, names: tuple[str, ...]) -> Any:
        key = (position, names)
        if key not in self._cache:
            self._cache[key] = self._read_group(self._groups[position], names)
            while len(self._cache) > 1 and sum(t.nbytes for t in self._cache.values()) > self._cache_bytes:
                self._cache.popitem(last=False)
        self._cache.move_to_end(key)
        return self._cache[key]

    def _read_group(self, group: _RowGroup, names: tuple[str, ...]) -> Any:
        metadata = self._metadata[group.file]
        size = _uncompressed_bytes(metadata.row_group(group.index), names)
        if size > MAX_GROUP_BYTES:
            raise DataError(
                "Parquet row group too large to read one picture from",
                where=f"{group.file}, row group {group.index}",
                why=f"{size / 2**30:.1f} GiB in one group; at most {MAX_GROUP_BYTES / 2**30:.0f} GiB fit",
                hint="write the file again with small groups: pyarrow.parquet.write_table(table, path, "
                "row_group_size=100)",
            )
        try:
            with pq.ParquetFile(group.file, metadata=metadata) as parquet:
                return parquet.read_row_group(group.index, columns=list(names))
        except (pa.ArrowException, OSError) as error:
            raise _damaged(f"{group.file}, row group {group.index}", error) from error


def picture_source(cell: Any, folder: Path, where: str) -> Path | bytes:
    """What `open_image` takes, from a picture cell: bytes, a path, or a struct {bytes, path} (HF datasets).

    Paths are relative to `folder` and stay in it. Raises DataError for one that does not, and for an empty cell.
    """
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes) and cell:
        return cell
    if isinstance(cell, str) and cell:
        return inside(folder, cell, where)
    raise DataError(
        "no picture in this row",
        where=where,
        why="the cell is empty" if not cell else f"the cell is of type {type(cell).__name__}",
        hint="a picture is bytes, a path, or a struct {bytes, path}",
    )


def _matching(path: Path) -> list[Path]:
    if path.exists() or not any(sign in path.name for sign in "*?["):
        require_file(path)
        return [path]
    files = sorted(path.parent.glob(path.name))
    if not files:
        raise DataError("no file matches the pattern", where=str(path))
    return files


def _uncompressed_bytes(group: Any, names: tuple[str, ...]) -> int:
    leaves = [group.column(i) for i in range(group.num_columns)]
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] in names)


def _damaged(where: str, error: Exception) -> DataError:
    return DataError("Parquet file cannot be read", where=where, why=first_line(error))
