"""Captioned pictures for supervised fine-tuning: a folder, or a Parquet table that is read lazily."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.assets import resolve
from diffalign.config import PicturesConfig
from diffalign.config.sizes import Resolution, Size
from diffalign.data.buckets import Buckets
from diffalign.data.inside import inside
from diffalign.data.tables import JsonTable, ParquetTable, picture_source
from diffalign.data.textfiles import choose_column, listed, read_text
from diffalign.errors import DataError
from diffalign.images import open_image, picture_size, resize_crop, to_tensor

IMAGE_COLUMNS = ("image", "jpg", "png", "picture")
CAPTION_COLUMNS = ("text", "caption", "prompt")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
METADATA = "metadata.jsonl"


class CaptionedImages:
    """Pictures and their captions, by index.

    Args:
        config: `path` is a Parquet file (or a pattern of several), a folder with `metadata.jsonl`
            (`file_name` and a caption per line), or a folder, searched recursively, with a .txt beside each
            picture. Pictures of a folder come in the order of their paths.
        sizes: buckets to sort the pictures into; None: none.

    Raises:
        DataError: nothing there, or pictures without a caption (the first few are listed). Pictures are
            decoded by `load` only.
    """

    def __init__(self, config: PicturesConfig, sizes: Sequence[Size] | None = None) -> None:
        path = resolve(config.path)
        self._table: ParquetTable | None = None
        self._files: list[Path] = []
        if path.is_dir():
            found = find_pictures(path)
            captioned = (
                _from_metadata(path, found, config) if (path / METADATA).exists() else _sidecars(path, found)
            )
            self._files, self._captions = list(captioned), list(captioned.values())
        elif path.exists() and path.suffix != ".parquet":
            raise DataError(
                "not a picture set", where=str(path), hint="use a folder of pictures, or a .parquet file"
            )
        else:
            self._table = ParquetTable(path)
            self._column, self._captions = _from_parquet(self._table, path, config)
        self.buckets = None if sizes is None else Buckets(sizes, len(self), self.sizes)

    def __len__(self) -> int:
        return len(self._captions)

    def describe(self) -> str:
        """What there is, counted."""
        words = f"{len(self):,} captioned pictures"
        return words if self.buckets is None else f"{words} of {self.buckets.describe()}"

    def caption(self, index: int) -> str:
        return self._captions[index]

    def sizes(self, index: int) -> list[Size]:
        """Height and width of picture `index` as it is, from its header. Raises DataError as `load`."""
        return [picture_size(*self._source(index))]

    def load(self, index: int, resolution: Resolution) -> Tensor:
        """Picture `index`, its centre resized: float32 [3, height, width] in [0, 1]; see `resize_crop`.

        Raises:
            DataError: the picture is missing or damaged; the message names its file or row.
        """
        source, where = self._source(index)
        return to_tensor([resize_crop(open_image(source, where), resolution)])[0]

    def _source(self, index: int) -> tuple[Path | bytes, str]:
        """A picture as `open_image` takes it, and its place for messages."""
        if self._table is None:
            return self._files[index], str(self._files[index])
        where = self._table.where(index)
        (cell,) = self._table.cells(index, (self._column,))
        return picture_source(cell, self._table.folder, where), where


def find_pictures(folder: Path) -> list[Path]:
    """Pictures below `folder`, by relative path; hidden files (macOS writes ._name.jpg) are left out.

    Raises:
        DataError: there are none, or one is a link that leads out of the folder.
    """
    files = [
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    ]
    if not files:
        raise DataError(
            "no pictures in this folder",
            where=str(folder),
            why=f"looked for {', '.join(sorted(SUFFIXES))}, in subfolders too",
            hint=f"for Parquet, use the pattern {folder}/*.parquet"
            if any(folder.glob("*.parquet"))
            else None,
        )
    for file in files:
        if file.is_symlink():
            inside(folder, str(file.relative_to(folder)), str(folder))
    return sorted(files, key=Path.as_posix)


def _sidecars(folder: Path, pictures: list[Path]) -> dict[Path, str]:
    captions: dict[Path, str] = {}
    for picture in pictures:
        name = str(picture.with_suffix(".txt").relative_to(folder))
        sidecar = inside(folder, name, str(folder))
        captions[picture] = read_text(sidecar).strip() if sidecar.exists() else ""
    _require_captions(
        [str(picture) for picture, caption in captions.items() if not caption],
        len(pictures),
        hint=f"write a .txt of the same name beside each picture, or one {METADATA} in the folder",
    )
    return captions


def _from_metadata(folder: Path, pictures: list[Path], config: PicturesConfig) -> dict[Path, str]:
    table = JsonTable(folder / METADATA)
    where = str(folder / METADATA)
    name_key = choose_column([config.image_column or "file_name"], table.columns, where)
    caption_key = _caption_column(table.columns, config, where)
    names = map(str, table.column(name_key))
    files = [inside(folder, name, table.where(row)) for row, name in enumerate(names)]
    twice = [file for file, count in Counter(files).items() if count > 1]
    missing = [file for file in files if not file.is_file()]
    for what, wrong in (("listed twice", twice), ("not found", missing)):
        if wrong:
            raise DataError(f"{len(wrong)} pictures of {METADATA} {what}", where=where, why=listed(wrong))
    captions = dict(zip(files, map(_text, table.column(caption_key)), strict=True))
    _require_captions(
        [str(file) for file in dict.fromkeys([*pictures, *files]) if not captions.get(file)],
        len(captions.keys() | set(pictures)),
        hint=f"add them to {where}, or move them out of the folder",
    )
    return dict(sorted(captions.items(), key=lambda item: item[0].as_posix()))


def _from_parquet(table: ParquetTable, path: Path, config: PicturesConfig) -> tuple[str, list[str]]:
    candidates = [config.image_column] if config.image_column else IMAGE_COLUMNS
    image_column = choose_column(candidates, table.columns, str(path))
    captions = [_text(value) for value in table.column(_caption_column(table.columns, config, str(path)))]
    _require_captions(
        [table.where(row) for row, caption in enumerate(captions) if not caption], len(captions)
    )
    return image_column, captions


def _caption_column(present: list[str], config: PicturesConfig, where: str) -> str:
    return choose_column(
        [config.caption_column] if config.caption_column else CAPTION_COLUMNS, present, where
    )


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else ""


def _require_captions(without: list[str], total: int, hint: str | None = None) -> None:
    if without:
        raise DataError(
            f"{len(without)} of {total} pictures have no caption", where=listed(without), hint=hint
        )
