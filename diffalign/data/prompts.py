"""Prompts: read from the formats they come in, and drawn without replacement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from diffalign.assets import resolve
from diffalign.data.order import batch_indices
from diffalign.data.tables import ParquetTable
from diffalign.data.textfiles import (
    Row,
    choose_column,
    csv_rows,
    json_lines,
    json_list,
    require_file,
    text_lines,
    tsv_rows,
)
from diffalign.errors import DataError

PROMPT_COLUMNS = ("prompt", "Prompt", "caption", "text")
"""Where a prompt is looked for in files with columns, in this order."""


def load_prompts(path: str, limit: int | None = None) -> list[str]:
    """The prompts of a .txt, .jsonl, .json, .csv, .tsv or .parquet file, stripped, in file order.

    Args:
        path: a file, or `bundled:NAME`. In .txt one prompt a line, blank lines and `#` comments skipped; in
            JSON strings or objects; elsewhere the first of `PROMPT_COLUMNS`.
        limit: the first n prompts only; the rest is not checked.

    Raises:
        DataError: unreadable, of an unknown format, without prompts, or a prompt that is missing or empty
            (naming the line).
    """
    file = resolve(path)
    require_file(file)
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise DataError(
            "unknown prompt format",
            where=str(file),
            why=f"the name ends in {file.suffix!r}" if file.suffix else "the name has no ending",
            hint=f"use one of {', '.join(_READERS)}",
        )
    prompts = [_prompt(value, where) for where, value in islice(reader(file), limit)]
    if not prompts:
        raise DataError(
            "no prompts",
            where=str(file),
            why="the file is empty, or holds only blank lines, comments or a header",
        )
    return prompts


class PromptSource:
    """Prompts for online training: every one comes once before any comes again.

    Args:
        prompts: at least one.
        seed: the draw of an iteration is a function of (seed, iteration, n) only.
    """

    def __init__(self, prompts: Sequence[str], seed: int) -> None:
        if not prompts:
            raise DataError("no prompts to draw from")
        self.prompts = list(prompts)
        self.seed = seed

    def draw(self, iteration: int, n: int) -> list[str]:
        """The n prompts of one iteration (counting from 0); n may be larger than the number of prompts."""
        indices = batch_indices(len(self.prompts), n, step=iteration, seed=self.seed, rank=0, world=1)
        return [self.prompts[index] for index in indices]


def _prompt(value: Any, where: str) -> str:
    if isinstance(value, dict):
        value = value[choose_column(PROMPT_COLUMNS, list(value), where)]
    if not isinstance(value, str):
        raise DataError(
            "prompt is missing" if value is None else "prompt is not text", where=where, why=f"got {value!r}"
        )
    if not value.strip():
        raise DataError("prompt is empty", where=where, hint="remove the line, or write a prompt")
    return value.strip()


def _parquet_rows(file: Path) -> Iterator[Row]:
    table = ParquetTable(file)
    column = choose_column(PROMPT_COLUMNS, table.columns, str(file))
    for row, value in enumerate(table.column(column)):
        yield table.where(row), value


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": text_lines,
    ".jsonl": json_lines,
    ".json": json_list,
    ".csv": csv_rows,
    ".tsv": tsv_rows,
    ".parquet": _parquet_rows,
}
