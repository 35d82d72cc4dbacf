"""Lists of pictures of one prompt, with a score for each or to be scored."""

from __future__ import annotations

import math
from pathlib import PurePath
from typing import Any

from torch import Tensor

from diffalign.assets import resolve
from diffalign.config import RankedConfig
from diffalign.config.sizes import Resolution
from diffalign.data.images import CAPTION_COLUMNS
from diffalign.data.prompts import PUBLISHED, load_prompts
from diffalign.data.tables import JsonTable, Table, open_table, picture_source
from diffalign.data.textfiles import choose_column
from diffalign.errors import DataError
from diffalign.images import open_image, resize_crop, to_tensor

PICTURES, SCORES = "images", "scores"
PROMPT_FILES = (".txt", ".csv", ".tsv", ".json")


def names_prompts(path: str) -> bool:
    """Whether `data.path` is of prompts only, without pictures."""
    return path.startswith(PUBLISHED) or PurePath(path).suffix.lower() in PROMPT_FILES


class PromptsToRank:
    """Prompts whose lists of pictures are yet to be sampled and scored. Raises DataError like `load_prompts`."""

    scores: None = None

    def __init__(self, path: str) -> None:
        self.prompts = load_prompts(path)

    def __len__(self) -> int:
        return len(self.prompts)

    def describe(self) -> str:
        """What there is, counted."""
        return f"{len(self):,} prompts whose pictures are to be sampled and ranked"

    def prompt(self, index: int) -> str:
        return self.prompts[index]


class RankedLists:
    """Lists of two or more pictures, their prompts and their scores, by index.

    A Parquet table (one file or a pattern) or a .jsonl file with `images` (a list of pictures), a prompt (the first of
    `CAPTION_COLUMNS`) and, where they are known, `scores`: a list of as many numbers, higher is better, in any unit.
    Lists whose pictures all score alike teach nothing and are left out. Pictures are read by `load` only.

    Args:
        config: where they are.

    Raises:
        DataError: a missing column (those present are listed), a list of fewer than two, numbers of scores and
            pictures that differ, a score that is not finite, or no list left.
    """

    def __init__(self, config: RankedConfig) -> None:
        self._table = open_table(resolve(config.path))
        self._prompts = _prompts(self._table, config.path)
        self.scores: list[list[float]] | None = None
        """Of the lists that are left, in the order of the file; None where the file has no scores."""
        self._rows = list(range(len(self._table)))
        if isinstance(self._table, JsonTable):
            for row, pictures in enumerate(self._table.column(PICTURES)):
                _require_list(pictures, self._table.where(row))
        if SCORES in self._table.columns:
            found = [
                _scores(values, self._table.where(row))
                for row, values in enumerate(self._table.column(SCORES))
            ]
            if isinstance(self._table, JsonTable):
                for row, pictures in enumerate(self._table.column(PICTURES)):
                    _require_as_many(pictures, found[row], self._table.where(row))
            self._rows = [row for row in self._rows if len(set(found[row])) > 1]
            self.scores = [found[row] for row in self._rows]
        if not self._rows:
            raise DataError(
                "every list has one score only",
                where=config.path,
                why=f"the pictures of each of the {len(self._table)} lists score alike",
            )

    def __len__(self) -> int:
        return len(self._rows)

    def describe(self) -> str:
        """What there is to train on, counted."""
        return f"{len(self):,} " + (
            "lists to be scored by the rewards" if self.scores is None else "ranked lists"
        )

    def prompt(self, index: int) -> str:
        return self._prompts[self._rows[index]]

    def load(self, index: int, resolution: Resolution) -> Tensor:
        """The pictures of list `index`, their centres resized: float32 [k, 3, height, width] in [0, 1].

        Raises:
            DataError: a picture is missing or damaged; the message names its row and place.
        """
        row = self._rows[index]
        where = self._table.where(row)
        (cells,) = self._table.cells(row, (PICTURES,))
        _require_list(cells, where)
        if self.scores is not None:
            _require_as_many(cells, self.scores[index], where)
        pictures = []
        for number, cell in enumerate(cells):
            place = f"{where}, {PICTURES} {number}"
            source = picture_source(cell, self._table.folder, place)
            pictures.append(resize_crop(open_image(source, place), resolution))
        return to_tensor(pictures)


def _prompts(table: Table, path: str) -> list[str]:
    if PICTURES not in table.columns:
        raise DataError(
            "not a table of ranked lists",
            where=path,
            why=f"found: {', '.join(table.columns)}",
            hint=f"lists need the columns prompt, {PICTURES} (a list of pictures) and {SCORES} (a list of numbers; "
            "without it the run's rewards score them); dpo learns from pairs",
        )
    prompts = table.column(choose_column(CAPTION_COLUMNS, table.columns, path))
    for row, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise DataError("prompt is not text", where=table.where(row), why=f"got {prompt!r}")
    return prompts


def _require_list(cells: Any, where: str) -> None:
    if not isinstance(cells, list) or len(cells) < 2:
        got = f"{len(cells)}" if isinstance(cells, list) else repr(cells)
        raise DataError(
            "a list needs two pictures or more", where=f"{where}, {PICTURES}", why=f"got {got[:80]}"
        )


def _require_as_many(cells: list[Any], scores: list[float], where: str) -> None:
    if len(cells) != len(scores):
        raise DataError(
            f"{len(cells)} pictures but {len(scores)} scores",
            where=where,
            why="each picture has its own score",
        )


def _scores(values: Any, where: str) -> list[float]:
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise DataError(
            "scores are not a list of finite numbers",
            where=f"{where}, {SCORES}",
            why=f"got {values!r:.80}",
            hint=f"leave the column {SCORES} out of the whole file to have the run's rewards score the pictures",
        )
    return [float(value) for value in values]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
