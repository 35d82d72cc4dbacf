"""Preference pairs: two pictures of one prompt, and which of them people preferred."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from diffalign.assets import resolve
from diffalign.config import PairsConfig
from diffalign.config.data import LABEL_COLUMN
from diffalign.config.sizes import Resolution, Size
from diffalign.data.buckets import Buckets
from diffalign.data.inside import inside
from diffalign.data.tables import JsonTable, Table, open_table, picture_source
from diffalign.data.textfiles import choose_column, listed
from diffalign.errors import DataError
from diffalign.images import open_image, picture_size, resize_crop, to_tensor

PROMPT_COLUMNS = ("caption", "prompt", "text")
PICTURES = ("jpg_0", "jpg_1")
LABELLED = (*PICTURES, LABEL_COLUMN)
BINARIZED = ("chosen", "rejected")
MARGIN = "margin"
PROMPT_LISTS = (".txt", ".csv", ".tsv", ".json")


class PreferencePairs:
    """The training and the held-out pairs of a run.

    Two layouts, in Parquet or jsonl: Pick-a-Pic's (`jpg_0, jpg_1, label_0`, where label_0 is the probability
    that picture 0 is preferred and a false `has_label` means a tie) and binarized (`chosen, rejected`); the
    prompt is in the first of `PROMPT_COLUMNS`. Pictures are read by `PairSet.load` only. A column `margin`, where there
    is one, says how much better picture 0 (or the chosen one) is than the other, in calibrated rewards. `label_column`
    names another judge's labels of the same pictures; `has_label` and `margin` belong to `label_0`.

    Held out are the pairs of `validation_path`, or those of `path` whose prompt hashes below
    `validation_fraction`: pairs of one prompt (up to case and spaces) are on the same side, in every run.

    Args:
        config: where the pairs are.
        ties: leave pairs with probability 0.5 out of `train`, or keep them ("soft"). `validation` never holds
            ties: they have no accuracy.
        sizes: buckets to sort the pairs into, by their preferred pictures; None: none.

    Raises:
        DataError: prompts or captioned pictures instead of pairs, a missing column (those present are listed), a
            label that is no probability, a margin that is no number, only ties, or no pair left to train on.
    """

    train: PairSet
    validation: PairSet

    def __init__(
        self, config: PairsConfig, ties: Literal["drop", "soft"], sizes: Sequence[Size] | None = None
    ) -> None:
        pairs = _Pairs.read(config.path, config.label_column)
        rows = range(len(pairs.prompts))
        held_out: Sequence[int]
        if config.validation_path is not None:
            validation = _Pairs.read(config.validation_path, config.label_column)
            held_out, training = range(len(validation.prompts)), list(rows)
        else:
            validation = pairs
            chosen = [_prompt_hash(pairs.prompts[row]) < config.validation_fraction for row in rows]
            held_out = [row for row in rows if chosen[row]]
            training = [row for row in rows if not chosen[row]]
        if ties == "drop":
            training = pairs.decided(training)
        if not training:
            raise DataError(
                "no pairs left to train on",
                where=config.path,
                why=f"all of the {len(rows)} pairs are held out for validation, or ties",
                hint="lower data.validation_fraction, or name a data.validation_path",
            )
        self.train = PairSet(pairs, training, sizes)
        self.validation = PairSet(validation, validation.decided(held_out), sizes)

    def describe(self) -> str:
        """What there is to train on, counted."""
        words = f"{len(self.train):,} judged pairs"
        buckets = self.train.buckets
        return words if buckets is None else f"{words} of {buckets.describe()}"


class PairSet:
    """Some pairs of a table, each with its preferred picture first. Made by `PreferencePairs`."""

    def __init__(self, pairs: _Pairs, rows: Sequence[int], sizes: Sequence[Size] | None = None) -> None:
        self._pairs = pairs
        self._rows = rows
        self.buckets = None if sizes is None else Buckets(sizes, len(self), self.sizes)

    def __len__(self) -> int:
        return len(self._rows)

    def prompt(self, index: int) -> str:
        return self._pairs.prompts[self._rows[index]]

    def probability(self, index: int) -> float:
        """Probability that the first picture of `load` is preferred: 0.5 (a tie) to 1."""
        first = self._pairs.probabilities[self._rows[index]]
        return max(first, 1.0 - first)

    @property
    def has_margins(self) -> bool:
        """Whether the table has a column `margin`."""
        return self._pairs.margins is not None

    def margin(self, index: int) -> float:
        """Margin of the first picture of `load` over the second. Raises ValueError where the table has none."""
        if self._pairs.margins is None:
            raise ValueError("these pairs have no margins")
        margin = self._pairs.margins[self._rows[index]]
        return -margin if self._column(index, 0) else margin

    def sizes(self, index: int) -> list[Size]:
        """Heights and widths of winner and loser as they are, from their headers. Raises DataError as `load`."""
        return [picture_size(self.source(index, n), self.place(index, n)) for n in (0, 1)]

    def load(self, index: int, resolution: Resolution) -> tuple[Tensor, Tensor]:
        """Winner and loser, their centres resized: each float32 [3, height, width] in [0, 1]; see `resize_crop`.

        Raises:
            DataError: a picture is missing or damaged; the message names its row and column.
        """
        first, second = (
            to_tensor([resize_crop(open_image(self.source(index, n), self.place(index, n)), resolution)])[0]
            for n in (0, 1)
        )
        return first, second

    def source(self, index: int, which: int) -> Path | bytes:
        """One picture of a pair as `open_image` takes it: 0 the preferred, 1 the other.

        Raises:
            DataError: the cell is empty, or no picture.
        """
        table, names = self._pairs.table, self._pairs.pictures
        cell = table.cells(self._rows[index], names)[self._column(index, which)]
        return picture_source(cell, table.folder, self.place(index, which))

    def place(self, index: int, which: int) -> str:
        """File, row or line, and column of a picture, for messages."""
        column = self._pairs.pictures[self._column(index, which)]
        return f"{self._pairs.table.where(self._rows[index])}, {column}"

    def _column(self, index: int, which: int) -> int:
        return which if self._pairs.probabilities[self._rows[index]] >= 0.5 else 1 - which


@dataclass(frozen=True)
class _Pairs:
    table: Table
    prompts: list[str]
    probabilities: list[float]
    pictures: tuple[str, str]
    margins: list[float] | None

    @classmethod
    def read(cls, path: str, label: str) -> _Pairs:
        _require_table(path)
        table = open_table(resolve(path))
        prompts = table.column(choose_column(PROMPT_COLUMNS, table.columns, path))
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise DataError("prompt is not text", where=table.where(row), why=f"got {prompt!r}")
        if {*PICTURES, label} <= set(table.columns):
            pictures, probabilities = PICTURES, _labels(table, label)
        elif label == LABEL_COLUMN and set(BINARIZED) <= set(table.columns):
            pictures, probabilities = BINARIZED, [1.0] * len(table)
        else:
            raise DataError(
                "not a table of preference pairs",
                where=path,
                why=f"found: {', '.join(table.columns)}",
                hint=f"pairs need the columns {', '.join((*PICTURES, label))}"
                + (f", or {', '.join(BINARIZED)}" if label == LABEL_COLUMN else " (data.label_column)")
                + _other_use(table.columns),
            )
        if isinstance(table, JsonTable):
            _require_files(table, pictures)
        margins = _margins(table) if label == LABEL_COLUMN else None
        pairs = cls(table, prompts, probabilities, pictures, margins)
        if not pairs.decided(range(len(prompts))):
            raise DataError(
                "every pair is a tie",
                where=path,
                why=f"none of the {len(prompts)} rows prefers a picture, by {label}",
            )
        return pairs

    def decided(self, rows: Sequence[int]) -> list[int]:
        """Those of `rows` that are not ties."""
        return [row for row in rows if self.probabilities[row] != 0.5]


def _require_table(path: str) -> None:
    """Raises DataError for what other methods learn from: a list of prompts, a folder of captioned pictures."""
    file = resolve(path)
    if file.is_dir():
        raise DataError(
            "a folder where a file is needed",
            where=path,
            why="preference pairs are one table; a folder of captioned pictures is what sft learns from",
            hint="name the .parquet or .jsonl file of the pairs",
        )
    if file.is_file() and file.suffix in PROMPT_LISTS:
        raise DataError(
            "not a table of preference pairs",
            where=path,
            why="it is a list of prompts, which methods that sample (ddpo, say) learn from",
            hint=f"pairs are a .parquet or .jsonl file with {', '.join(LABELLED)}, or {', '.join(BINARIZED)}",
        )


def _other_use(columns: Sequence[str]) -> str:
    """Which methods learn from a table without pairs, where that can be told."""
    if any("image" in name or "picture" in name or name in ("jpg", "png", "file_name") for name in columns):
        return "; captioned pictures are what sft learns from"
    if not any(name in columns for name in (*LABELLED, *BINARIZED)):
        return "; prompts alone are what methods that sample (ddpo, say) learn from"
    return ""


def _margins(table: Table) -> list[float] | None:
    if MARGIN not in table.columns:
        return None
    margins: list[float] = []
    for row, margin in enumerate(table.column(MARGIN)):
        if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
            raise DataError(
                "margin is not a number",
                where=f"{table.where(row)}, {MARGIN}",
                why=f"got {margin!r}; it is the reward of picture 0 (or the chosen one) minus that of the other",
            )
        margins.append(float(margin))
    return margins


def _labels(table: Table, column: str) -> list[float]:
    labels = table.column(column)
    has_gaps = column == LABEL_COLUMN and "has_label" in table.columns
    labelled = table.column("has_label") if has_gaps else [True] * len(labels)
    probabilities: list[float] = []
    for row, (label, counts) in enumerate(zip(labels, labelled, strict=True)):
        if not counts:
            probabilities.append(0.5)
        elif isinstance(label, int | float) and 0 <= label <= 1:
            probabilities.append(float(label))
        else:
            raise DataError(
                "label is not a probability",
                where=f"{table.where(row)}, {column}",
                why=f"got {label!r}; 1 means picture 0 is preferred, 0 picture 1, and 0.5 is a tie",
            )
    return probabilities


def _require_files(table: JsonTable, pictures: tuple[str, str]) -> None:
    named = {
        name: table.where(row)
        for column in pictures
        for row, name in enumerate(table.column(column))
        if isinstance(name, str)
    }
    files = [inside(table.folder, name, where) for name, where in named.items()]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} pictures not found",
            where=listed(missing),
            hint="paths are relative to the folder of the .jsonl file",
        )


def _prompt_hash(prompt: str) -> float:
    """A number in [0, 1) that depends on the words of the prompt only."""
    text = " ".join(prompt.split()).casefold()
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
