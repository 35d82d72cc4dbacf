"""Single pictures with a caption and a label: liked or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from diffalign.assets import resolve
from diffalign.config import LabelledConfig, PairsConfig
from diffalign.config.sizes import Resolution, Size
from diffalign.data.buckets import Buckets
from diffalign.data.images import CAPTION_COLUMNS, IMAGE_COLUMNS, METADATA
from diffalign.data.inside import inside
from diffalign.data.preferences import BINARIZED, LABELLED, PreferencePairs
from diffalign.data.tables import JsonTable, Table, open_table, picture_source
from diffalign.data.textfiles import choose_column, listed
from diffalign.errors import DataError
from diffalign.images import open_image, picture_size, resize_crop, to_tensor

LABEL = "label"
FILE_COLUMNS = ("file_name", *IMAGE_COLUMNS)


class _Labelled(NamedTuple):
    """Captions and labels by index, and a picture as `open_image` takes it with its place for messages."""

    captions: list[str]
    labels: list[bool]
    picture: Callable[[int], tuple[Path | bytes, str]]


class LabelledImages:
    """Pictures, their captions, and whether people liked them, by index.

    A Parquet table (one file or a pattern) or a .jsonl file with a picture (the first of `FILE_COLUMNS`), a caption
    (`CAPTION_COLUMNS`) and `label`: true or false, 1 or 0. Or a folder with such a `metadata.jsonl`. With
    `from_pairs`, a file of preference pairs: of its i-th decided pair, picture 2i is the preferred one, 2i + 1 the
    other.

    Args:
        config: where they are.
        sizes: buckets to sort the pictures into; None: none.

    Raises:
        DataError: no labels (pairs and captioned pictures are told what they are for), one that is neither true nor
            false, pictures of one kind only, or a picture or caption that is missing. Pictures are decoded by `load`.
    """

    def __init__(self, config: LabelledConfig, sizes: Sequence[Size] | None = None) -> None:
        self._found = _from_pairs(config) if config.from_pairs else _from_table(config)
        self.pictures_per_label = 2 if config.from_pairs else 1
        """A judged pair is one label and gives two pictures."""
        missing = [kind for kind, value in (("liked", True), ("disliked", False)) if value not in self.labels]
        if missing:
            raise DataError(
                f"none of the {len(self)} pictures is {missing[0]}",
                where=config.path,
                why="kto learns from the contrast of liked and disliked pictures",
                hint="sft learns from good pictures alone",
            )
        self.buckets = None if sizes is None else Buckets(sizes, len(self), self.sizes)

    def __len__(self) -> int:
        return len(self._found.captions)

    @property
    def labels(self) -> list[bool]:
        return self._found.labels

    def describe(self) -> str:
        """What there is to train on, counted."""
        liked = sum(self.labels)
        words = f"{len(self):,} labelled pictures ({liked:,} liked, {len(self) - liked:,} disliked)"
        return words if self.buckets is None else f"{words} of {self.buckets.describe()}"

    def caption(self, index: int) -> str:
        return self._found.captions[index]

    def sizes(self, index: int) -> list[Size]:
        """Height and width of picture `index` as it is, from its header. Raises DataError as `load`."""
        return [picture_size(*self._found.picture(index))]

    def load(self, index: int, resolution: Resolution) -> Tensor:
        """Picture `index`, its centre resized: float32 [3, height, width] in [0, 1]; see `resize_crop`.

        Raises:
            DataError: the picture is missing or damaged; the message names its row.
        """
        source, where = self._found.picture(index)
        return to_tensor([resize_crop(open_image(source, where), resolution)])[0]


def _from_pairs(config: LabelledConfig) -> _Labelled:
    wanted = PairsConfig(
        path=config.path,
        validation_fraction=config.validation_fraction,
        label_column=config.label_column,
    )
    pairs = PreferencePairs(wanted, "drop").train
    captions = [pairs.prompt(i // 2) for i in range(2 * len(pairs))]

    def picture(index: int) -> tuple[Path | bytes, str]:
        return pairs.source(index // 2, index % 2), pairs.place(index // 2, index % 2)

    return _Labelled(captions, [True, False] * len(pairs), picture)


def _from_table(config: LabelledConfig) -> _Labelled:
    table = _open(config.path)
    if any(set(columns) <= set(table.columns) for columns in (LABELLED, BINARIZED)):
        raise DataError(
            "preference pairs where single labelled pictures are needed",
            where=config.path,
            why=f"found: {', '.join(table.columns)}",
            hint="algorithm.name: dpo learns from pairs; data.from_pairs: true makes one liked and one disliked "
            "picture of each for kto",
        )
    if LABEL not in table.columns:
        raise _no_labels(config.path, f"found: {', '.join(table.columns)}")
    column = choose_column(FILE_COLUMNS, table.columns, config.path)
    texts = table.column(choose_column(CAPTION_COLUMNS, table.columns, config.path))
    labels = table.column(LABEL)
    captions = [_caption(text, table.where(row)) for row, text in enumerate(texts)]
    found = [_label(value, table.where(row)) for row, value in enumerate(labels)]
    if isinstance(table, JsonTable):
        _require_files(table, column)

    def picture(index: int) -> tuple[Path | bytes, str]:
        where = table.where(index)
        return picture_source(table.cells(index, (column,))[0], table.folder, where), where

    return _Labelled(captions, found, picture)


def _open(path: str) -> Table:
    file = resolve(path)
    if not file.is_dir():
        return open_table(file)
    if not (file / METADATA).is_file():
        raise _no_labels(path, f"there is no {METADATA} in this folder")
    return JsonTable(file / METADATA)


def _no_labels(path: str, why: str) -> DataError:
    return DataError(
        "pictures without labels",
        where=path,
        why=why,
        hint=f"kto needs `{LABEL}` for each picture, true (liked) or false: a column of a .parquet file, or a key of "
        f"a .jsonl file or of {METADATA}; sft learns from captioned pictures without labels",
    )


def _caption(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DataError("picture without a caption", where=where, why=f"got {value!r}")
    return value.strip()


def _label(value: Any, where: str) -> bool:
    if isinstance(value, bool | int | float) and value in (0, 1):
        return bool(value)
    raise DataError(
        "label is neither true nor false",
        where=f"{where}, {LABEL}",
        why=f"got {value!r}; true (or 1) is a liked picture, false (or 0) a disliked one",
    )


def _require_files(table: JsonTable, column: str) -> None:
    names = [
        (name, table.where(row)) for row, name in enumerate(table.column(column)) if isinstance(name, str)
    ]
    missing = [file for name, where in names if not (file := inside(table.folder, name, where)).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} pictures not found",
            where=listed(missing),
            hint="paths are relative to the folder of the .jsonl file",
        )
