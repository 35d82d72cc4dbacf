"""Where the pictures to be scored come from: a folder, files, a pattern, a table, preference pairs."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from diffalign.assets import resolve
from diffalign.config import ImagesConfig, PairsConfig
from diffalign.config.data import LABEL_COLUMN
from diffalign.data.images import METADATA, SUFFIXES, CaptionedImages, find_pictures
from diffalign.data.preferences import PairSet, PreferencePairs
from diffalign.data.prompts import load_prompts
from diffalign.data.tables import open_table, picture_source
from diffalign.data.textfiles import choose_column, listed, read_text
from diffalign.errors import DataError

IMAGE_COLUMNS = ("image", "file_name", "jpg", "png", "picture")
PROMPT_COLUMNS = ("prompt", "caption", "text")
TABLES = (".jsonl", ".parquet")


class PictureSource(Protocol):
    """Pictures in a fixed order; none is read before `source` asks for it."""

    where: str
    """The whole set, absolute: what a resumed run compares."""
    files: list[str]
    """A name for each picture, for results and messages."""

    def source(self, index: int) -> Path | bytes:
        """What `diffalign.images.open_image` takes; DataError where the table's cell holds no picture."""

    def stamp(self, index: int) -> str:
        """Changes when the picture does: size and time of its file, or of the table that holds its bytes."""

    def prompts(self, required: bool) -> list[str | None]:
        """One prompt a picture, or None; DataError where one is `required` and missing."""


def open_pictures(paths: Sequence[str]) -> PictureSource:
    """The pictures behind the words of a command line.

    Args:
        paths: one folder (searched recursively), table (.jsonl or .parquet, with the picture in the first of
            `IMAGE_COLUMNS`), or pattern of pictures or Parquet files; or any number of picture files.

    Raises:
        DataError: nothing there, no pictures among what is there, or a table without pictures.
    """
    if len(paths) != 1:
        return PictureFiles([Path(path).expanduser() for path in paths], str(Path.cwd()))
    path = resolve(paths[0])
    if path.is_dir():
        return FolderPictures(path)
    if path.suffix.lower() in TABLES:
        return TablePictures(path)
    if path.exists() or not glob.has_magic(str(path)):
        return PictureFiles([path], str(Path.cwd()))
    return PictureFiles(_matching(str(path)), str(path.absolute()))


class PictureFiles:
    """Picture files by name, as they were written; prompts in a .txt beside each.

    Args:
        paths: the files.
        where: what they have in common: a pattern, or the folder that their names start from.
    """

    def __init__(self, paths: Sequence[Path], where: str) -> None:
        missing = [path for path in paths if not path.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(paths)} files not found"
                if len(paths) > 1
                else "no such file or folder",
                where=listed(missing),
                why=f"looked from {Path.cwd()}",
            )
        others = [path for path in paths if path.suffix.lower() not in SUFFIXES]
        if others:
            raise DataError(
                "not pictures by their names",
                where=listed(others),
                why=f"pictures end in {', '.join(sorted(SUFFIXES))}",
                hint="give one folder, one .jsonl, one .parquet or one quoted pattern; or picture files only",
            )
        self.where = storable(where)
        self.files = [storable(path.as_posix()) for path in paths]
        self._paths = [path.absolute() for path in paths]

    def source(self, index: int) -> Path:
        return self._paths[index]

    def stamp(self, index: int) -> str:
        return file_stamp(self._paths[index])

    def prompts(self, required: bool) -> list[str | None]:
        sidecars = [path.with_suffix(".txt") for path in self._paths]
        if not required and not all(sidecar.is_file() for sidecar in sidecars):
            return [None] * len(sidecars)
        texts = [read_text(sidecar).strip() if sidecar.is_file() else "" for sidecar in sidecars]
        if required:
            _require_prompts(
                texts,
                self.files,
                hint="write a .txt of the same name beside each picture, or give --prompts FILE",
            )
        return [text or None for text in texts]


class FolderPictures(PictureFiles):
    """All pictures below a folder, named relative to it; prompts in metadata.jsonl, or in .txt files."""

    def __init__(self, folder: Path) -> None:
        super().__init__(find_pictures(folder), str(folder.absolute()))
        self._folder = folder
        self.files = [storable(path.relative_to(folder.absolute()).as_posix()) for path in self._paths]

    def prompts(self, required: bool) -> list[str | None]:
        if not (self._folder / METADATA).is_file():
            return super().prompts(required)
        captioned = CaptionedImages(ImagesConfig(path=str(self._folder)))
        if len(captioned) != len(self.files):
            raise DataError(
                f"{METADATA} lists {len(captioned)} pictures, the folder has {len(self.files)}",
                where=str(self._folder / METADATA),
                why=f"pictures are known by their endings: {', '.join(sorted(SUFFIXES))}",
            )
        return [captioned.caption(index) for index in range(len(captioned))]


class TablePictures:
    """The rows of a .jsonl or of Parquet files: pictures as paths (relative to the file) or bytes, and prompts."""

    def __init__(self, path: Path) -> None:
        self.where = storable(str(path.absolute()))
        self._table = open_table(path)
        self._column = choose_column(IMAGE_COLUMNS, self._table.columns, str(path))
        self._stamp = table_stamp(path)
        self._holds_paths = _path_of(self._cell(0)) is not None
        cells = self._table.column(self._column) if self._holds_paths else [None] * len(self._table)
        self.files = [
            storable(_path_of(cell) or _below(self._table.where(row), self._table.folder))
            for row, cell in enumerate(cells)
        ]

    def source(self, index: int) -> Path | bytes:
        return picture_source(self._cell(index), self._table.folder, self._table.where(index))

    def stamp(self, index: int) -> str:
        path = _path_of(self._cell(index)) if self._holds_paths else None
        return file_stamp(self._table.folder / path) if path else self._stamp

    def prompts(self, required: bool) -> list[str | None]:
        if not required and not set(PROMPT_COLUMNS) & set(self._table.columns):
            return [None] * len(self.files)
        column = choose_column(PROMPT_COLUMNS, self._table.columns, self.where)
        cells = self._table.column(column)
        texts = [cell.strip() if isinstance(cell, str) else "" for cell in cells]
        if required:
            _require_prompts(texts, [self._table.where(row) for row in range(len(texts))], hint=None)
        return [text or None for text in texts]

    def _cell(self, row: int) -> Any:
        return self._table.cells(row, (self._column,))[0]


class PairPictures:
    """Both pictures of every pair, the preferred one first: picture 2 i and 2 i + 1 belong to pair i.

    Args:
        path: what `diffalign.data.preferences.PreferencePairs` reads; nothing is held out, ties are kept.
        label_column: whose labels.
    """

    def __init__(self, path: str, label_column: str = LABEL_COLUMN) -> None:
        config = PairsConfig(path=path, validation_fraction=0.0, label_column=label_column)
        self.pairs: PairSet = PreferencePairs(config, "soft").train
        table = resolve(path).absolute()
        self.where = storable(str(table))
        places = [self.pairs.place(index // 2, index % 2) for index in range(2 * len(self.pairs))]
        self.files = [storable(_below(place, resolve(path).parent)) for place in places]
        self._holds_paths = table.suffix == ".jsonl"
        self._stamp = table_stamp(table)

    def source(self, index: int) -> Path | bytes:
        return self.pairs.source(index // 2, index % 2)

    def stamp(self, index: int) -> str:
        source = self.source(index) if self._holds_paths else b""
        return file_stamp(source) if isinstance(source, Path) else self._stamp

    def prompts(self, required: bool) -> list[str | None]:
        return [self.pairs.prompt(index // 2) for index in range(len(self.files))]


def prompts_for(pictures: PictureSource, file: Path | None, required: bool) -> list[str | None]:
    """One prompt a picture: those of `file` in the order of `pictures.files`, else the pictures' own.

    Raises:
        DataError: another number of prompts in `file`, or none for a picture where they are `required`.
    """
    if file is None:
        prompts = pictures.prompts(required)
    else:
        prompts = list(load_prompts(str(file)))
        if len(prompts) != len(pictures.files):
            raise DataError(
                f"{len(prompts)} prompts but {len(pictures.files)} pictures",
                where=f"{file}, {pictures.where}",
                hint="give one prompt a picture, in the order of the file names",
            )
    return [None if prompt is None else storable(prompt) for prompt in prompts]


def storable(text: str) -> str:
    """The text with what UTF-8 cannot hold (bytes of a file name, half surrogates of JSON) as escapes."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def file_stamp(file: Path) -> str:
    """Size and time of a file; another one once it is there, where it was missing."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def table_stamp(path: Path) -> str:
    """Size and time of a table's file, or of all files of a pattern."""
    files = [path] if path.exists() else sorted(path.parent.glob(path.name))
    return ", ".join(map(file_stamp, files))


def _matching(pattern: str) -> list[Path]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207 (absolute patterns too)
    if not matches:
        raise DataError("no file matches the pattern", where=pattern, why=f"looked from {Path.cwd()}")
    pictures = [match for match in matches if match.suffix.lower() in SUFFIXES and match.is_file()]
    if not pictures:
        raise DataError(
            "no picture matches the pattern",
            where=pattern,
            why=f"it matches {', '.join(match.name for match in matches[:3])}"
            f"{', ...' if len(matches) > 3 else ''}; pictures end in {', '.join(sorted(SUFFIXES))}",
        )
    return pictures


def _path_of(cell: Any) -> str | None:
    """The path in a picture cell, where the picture is a file of its own."""
    if isinstance(cell, dict) and not cell.get("bytes"):
        cell = cell.get("path")
    return cell if isinstance(cell, str) and cell else None


def _below(place: str, folder: Path) -> str:
    """`/data/a.parquet, row 3` as `a.parquet, row 3`."""
    return place.removeprefix(f"{folder}{os.sep}")


def _require_prompts(texts: Sequence[str], places: Sequence[str], hint: str | None) -> None:
    without = [place for text, place in zip(texts, places, strict=True) if not text]
    if without:
        raise DataError(
            f"{len(without)} of {len(texts)} pictures have no prompt (caption)",
            where=listed(without),
            hint=hint,
        )
