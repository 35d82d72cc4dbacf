from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffalign.config import ImagesConfig
from diffalign.data.images import CaptionedImages
from diffalign.data.tables import ParquetTable
from diffalign.errors import DataError


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (8, 6), (level, level, level))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(folder: Path, captions: dict[str, str | None]) -> ImagesConfig:
    """Picture i is grey level i; a caption of None leaves the sidecar out."""
    for level, (name, caption) in enumerate(captions.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        grey(level).save(folder / name)
        if caption is not None:
            (folder / name).with_suffix(".txt").write_text(caption)
    return ImagesConfig(path=str(folder))


def write_groups(path: Path, n: int, group: int) -> ImagesConfig:
    images = [png(grey(row)) for row in range(n)]
    captions = [f"caption {row}" for row in range(n)]
    pq.write_table(pa.table({"image": images, "text": captions}), path, row_group_size=group)
    return ImagesConfig(path=str(path))


def damage(path: Path, group: int, column: str) -> None:
    """Overwrite the bytes of one column of one row group."""
    chunks = pq.read_metadata(path).row_group(group)
    chunk = next(c for c in map(chunks.column, range(chunks.num_columns)) if c.path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def level(picture: torch.Tensor) -> int:
    return round(picture.mean().item() * 255)


def error_of(config: ImagesConfig) -> DataError:
    with pytest.raises(DataError) as caught:
        CaptionedImages(config)
    return caught.value


def test_a_folder_with_sidecars_is_read_recursively_in_path_order(tmp_path: Path):
    names = {"b.png": "second\n", "c/a.jpg": "third", "a.webp": "first"}
    images = CaptionedImages(write_folder(tmp_path, names))
    (tmp_path / "._b.png").write_bytes(b"left by macOS")
    assert [images.caption(i) for i in range(len(images))] == ["first", "second", "third"]
    assert [level(images.load(i, 8)) for i in range(3)] == [2, 0, 1]
    assert len(CaptionedImages(ImagesConfig(path=str(tmp_path)))) == 3


def test_load_resizes_the_centre_square(tmp_path: Path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = (0, 255, 0)  # the centre square of a wide picture
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("green")
    picture = CaptionedImages(ImagesConfig(path=str(tmp_path))).load(0, 16)
    assert picture.dtype == torch.float32
    assert_close(picture, torch.tensor([0.0, 1.0, 0.0]).reshape(3, 1, 1).expand(3, 16, 16))


def test_pictures_without_captions_are_counted_and_listed(tmp_path: Path):
    names: dict[str, str | None] = {f"{i}.png": None for i in range(7)}
    names["0.png"] = "fine"
    names["1.png"] = "  "
    error = error_of(write_folder(tmp_path, names))
    assert error.what == "6 of 7 pictures have no caption"
    listed = [str(tmp_path / f"{i}.png") for i in range(1, 6)]
    assert error.where == "\n".join([*listed, "... and 1 more"])


@pytest.mark.parametrize("key", ["text", "caption", "prompt"])
def test_metadata_gives_captions_by_file_name(tmp_path: Path, key: str):
    config = write_folder(tmp_path, {"a.png": None, "sub/b.png": None})
    lines = [{"file_name": "sub/b.png", key: "two"}, {"file_name": "a.png", key: "one"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    images = CaptionedImages(config)
    assert [images.caption(i) for i in range(2)] == ["one", "two"]
    assert [level(images.load(i, 8)) for i in range(2)] == [0, 1]


def test_the_caption_key_can_be_named(tmp_path: Path):
    write_folder(tmp_path, {"a.png": None})
    line = {"file_name": "a.png", "text": "no", "long": "yes"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    config = ImagesConfig(path=str(tmp_path), caption_column="long")
    assert CaptionedImages(config).caption(0) == "yes"
    missing = error_of(ImagesConfig(path=str(tmp_path), caption_column="short"))
    assert missing.what == "no column short"
    assert missing.why == "found: file_name, text, long"


@pytest.mark.parametrize(
    ("lines", "what"),
    [
        (['{"file_name": "a.png", "text": "a"}'], "1 of 2 pictures have no caption"),
        (['{"file_name": "a.png", "text": "a"}', '{"file_name": "b.png", "text": null}'], "1 of 2 pictures"),
        (['{"file_name": "a.png", "text": "a"}', '{"file_name": "c.png", "text": "c"}'], "not found"),
        (['{"file_name": "a.png", "text": "a"}'] * 2, "listed twice"),
        (['{"file_name": "a.png", "text": "a"}', '{"file_name": "b.png"}'], "no key text"),
        (['"a.png"'], "line is not a JSON object"),
        ([], "no rows"),
    ],
)
def test_metadata_that_does_not_fit_the_folder_is_refused(tmp_path: Path, lines: list[str], what: str):
    config = write_folder(tmp_path, {"a.png": None, "b.png": None})
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    assert what in error_of(config).what


def test_nothing_to_read_is_a_data_error(tmp_path: Path):
    assert error_of(ImagesConfig(path=str(tmp_path))).what == "no pictures in this folder"
    assert error_of(ImagesConfig(path=str(tmp_path / "gone"))).what == "file not found"
    (tmp_path / "a.zip").write_bytes(b"PK")
    assert error_of(ImagesConfig(path=str(tmp_path / "a.zip"))).what == "not a picture set"
    assert error_of(ImagesConfig(path=str(tmp_path / "x-*.parquet"))).what == "no file matches the pattern"


def test_an_unreadable_picture_names_its_file(tmp_path: Path):
    images = CaptionedImages(write_folder(tmp_path, {"a.png": "a"}))
    (tmp_path / "a.png").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"unreadable picture[^$]*a\.png"):
        images.load(0, 8)


def test_parquet_pictures_are_bytes_structs_or_paths(tmp_path: Path):
    grey(2).save(tmp_path / "two.png")
    structs = [
        {"bytes": png(grey(1)), "path": "elsewhere.png"},
        {"bytes": None, "path": "two.png"},
    ]
    pq.write_table(pa.table({"image": structs, "text": ["a", "b"]}), tmp_path / "s.parquet")
    images = CaptionedImages(ImagesConfig(path=str(tmp_path / "s.parquet")))
    assert [level(images.load(i, 8)) for i in range(2)] == [1, 2]
    pq.write_table(pa.table({"jpg": ["two.png"], "caption": ["b"]}), tmp_path / "p.parquet")
    assert level(CaptionedImages(ImagesConfig(path=str(tmp_path / "p.parquet"))).load(0, 8)) == 2


def test_parquet_errors_name_row_and_columns(tmp_path: Path):
    path = tmp_path / "a.parquet"
    config = ImagesConfig(path=str(path))
    pq.write_table(pa.table({"image": [png(grey(0)), b"bad", None], "text": ["a", "b", "c"]}), path)
    images = CaptionedImages(config)
    with pytest.raises(DataError, match=r"unreadable picture[^$]*a\.parquet, row 1"):
        images.load(1, 8)
    with pytest.raises(DataError, match=r"no picture in this row[^$]*a\.parquet, row 2"):
        images.load(2, 8)
    pq.write_table(pa.table({"image": [b"x"], "text": [None]}), path)
    assert error_of(config).where == f"{path}, row 0"
    pq.write_table(pa.table({"picture_bytes": [b"x"], "text": ["a"]}), path)
    assert error_of(config).why == "found: picture_bytes, text"
    pq.write_table(pa.table({"image": pa.array([], pa.binary()), "text": pa.array([], pa.string())}), path)
    assert error_of(config).what == "no rows"


def test_only_the_row_group_of_the_picture_is_read(tmp_path: Path):
    path = tmp_path / "a.parquet"
    config = write_groups(path, n=12, group=4)
    damage(path, 0, "image")
    damage(path, 2, "image")
    images = CaptionedImages(config)
    assert [images.caption(i) for i in (0, 11)] == ["caption 0", "caption 11"]
    assert [level(images.load(i, 8)) for i in range(4, 8)] == [4, 5, 6, 7]
    for row, group in ((3, 0), (8, 2)):
        with pytest.raises(DataError, match=rf"cannot be read[^$]*a\.parquet, row group {group}"):
            images.load(row, 8)


def test_shards_of_a_pattern_are_one_set_in_name_order(tmp_path: Path):
    for shard, first in (("train-1", 5), ("train-0", 0), ("test-0", 9)):
        images = [png(grey(first + i)) for i in range(4)]
        table = pa.table({"image": images, "text": [f"{shard} {i}" for i in range(4)]})
        pq.write_table(table, tmp_path / f"{shard}.parquet", row_group_size=3)
    images = CaptionedImages(ImagesConfig(path=str(tmp_path / "train-*.parquet")))
    assert len(images) == 8
    assert [images.caption(i) for i in (3, 4)] == ["train-0 3", "train-1 0"]
    assert [level(images.load(i, 8)) for i in range(8)] == [0, 1, 2, 3, 5, 6, 7, 8]
    assert ParquetTable(tmp_path / "train-*.parquet").where(7) == f"{tmp_path / 'train-1.parquet'}, row 3"


def test_shards_with_different_columns_are_refused(tmp_path: Path):
    pq.write_table(pa.table({"image": [b""], "text": ["a"]}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"image": [b""], "words": ["a"]}), tmp_path / "1.parquet")
    error = error_of(ImagesConfig(path=str(tmp_path / "*.parquet")))
    assert error.where == str(tmp_path / "1.parquet")


def test_walking_a_table_keeps_no_more_than_its_cache_in_memory(tmp_path: Path):
    path = tmp_path / "a.parquet"
    megabyte = np.random.default_rng(0).bytes(2**20)
    rows = 24  # groups of 2 MiB; the table is 24 MiB, the cache 4 MiB
    table = pa.table({"image": [bytes([row]) + megabyte for row in range(rows)]})
    pq.write_table(table, path, row_group_size=2, compression="none", use_dictionary=False)
    del table
    lazy = ParquetTable(path, cache_bytes=4 * 2**20)
    before, peak = pa.total_allocated_bytes(), 0
    for row in range(rows):
        assert lazy.cells(row, ["image"])[0][0] == row
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert 2 * 2**20 <= peak <= 7 * 2**20


def test_rows_outside_the_table_are_index_errors(tmp_path: Path):
    table = ParquetTable(Path(write_groups(tmp_path / "a.parquet", n=3, group=2).path))
    for row in (-1, 3):
        with pytest.raises(IndexError):
            table.cells(row, ["image"])


def test_a_row_group_that_would_fill_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    images = CaptionedImages(write_groups(tmp_path / "a.parquet", n=4, group=4))
    monkeypatch.setattr("diffalign.data.tables.MAX_GROUP_BYTES", 100)  # four PNG files take more
    with pytest.raises(
        DataError, match=r"row group too large[^$]*a\.parquet, row group 0[^$]*row_group_size"
    ):
        images.load(0, 8)
