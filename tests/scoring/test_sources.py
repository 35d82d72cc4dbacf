"""Every way to name the pictures that are to be scored."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.errors import DataError
from diffalign.scoring.run import read_picture
from diffalign.scoring.sources import PairPictures, open_pictures, prompts_for, storable


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pictures/a.png, b.png and sub/c.png in shades of 10, 20, 30; the working directory is above it."""
    for name, shade in (("a.png", 10), ("b.png", 20), ("sub/c.png", 30)):
        file = tmp_path / "pictures" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(shade))
    (tmp_path / "pictures" / ".hidden.png").write_bytes(b"")
    (tmp_path / "pictures" / "notes.md").write_text("")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "pictures"


def opened(*paths: str) -> dict[str, int]:
    """Shade by name."""
    pictures = open_pictures(paths)
    return {name: read_picture(pictures, i).getpixel((0, 0))[0] for i, name in enumerate(pictures.files)}


def test_folders_patterns_and_files(folder: Path):
    whole = {"a.png": 10, "b.png": 20, "sub/c.png": 30}
    assert opened("pictures") == opened(str(folder)) == whole
    assert opened("pictures/*.png") == {"pictures/a.png": 10, "pictures/b.png": 20}
    assert opened("pictures/**/*.png") == {f"pictures/{name}": shade for name, shade in whole.items()}
    assert opened(f"{folder}/*/*") == {f"{folder}/sub/c.png": 30}
    assert opened("pictures/b.png") == {"pictures/b.png": 20}
    two = open_pictures(["pictures/a.png", "pictures/b.png"])
    assert two.where == open_pictures(["pictures/a.png"]).where == str(folder.parent)
    assert opened("pictures/b.png", "pictures/a.png") == {"pictures/b.png": 20, "pictures/a.png": 10}


def test_a_folder_whose_name_looks_like_a_pattern(folder: Path):
    folder.rename(folder.with_name("pictures[1]"))
    assert list(opened("pictures[1]")) == ["a.png", "b.png", "sub/c.png"]


def test_tables_of_paths_bytes_and_structs(folder: Path):
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    by_path = [{"bytes": None, "path": "sub/c.png"}, {"bytes": None, "path": "a.png"}]
    by_bytes = [{"bytes": png(40), "path": "x.png"}, {"bytes": png(50), "path": None}]
    columns = {
        "paths": pa.array(["sub/c.png", "a.png"]),
        "bytes": pa.array([png(40), png(50)]),
        "struct_paths": pa.array(by_path, struct),
        "struct_bytes": pa.array(by_bytes, struct),
    }
    for name, images in columns.items():
        pq.write_table(pa.table({"image": images, "prompt": ["x", "y"]}), folder / f"{name}.parquet")
    lines = [{"image": "sub/c.png", "prompt": "x"}, {"image": str(folder / "a.png"), "prompt": "y"}]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))

    paths = {"sub/c.png": 30, "a.png": 10}
    assert opened("pictures/paths.parquet") == opened("pictures/struct_paths.parquet") == paths
    assert opened("pictures/rows.jsonl") == {"sub/c.png": 30, f"{folder}/a.png": 10}
    assert opened("pictures/bytes.parquet") == {"bytes.parquet, row 0": 40, "bytes.parquet, row 1": 50}
    assert list(opened("pictures/struct_bytes.parquet").values()) == [40, 50]
    assert list(opened("pictures/*bytes.parquet").values()) == [40, 50, 40, 50]
    assert open_pictures(["pictures/bytes.parquet"]).prompts(required=True) == ["x", "y"]


def test_a_stamp_follows_the_picture(folder: Path):
    (folder / "rows.jsonl").write_text('{"image": "a.png"}\n{"image": "later.png"}\n{"image": null}\n')
    pq.write_table(pa.table({"image": [png(1)]}), folder / "bytes.parquet")
    rows, table = open_pictures(["pictures/rows.jsonl"]), open_pictures(["pictures/bytes.parquet"])
    before = [rows.stamp(i) for i in range(3)], table.stamp(0)
    os.utime(folder / "bytes.parquet", (1, 1))
    (folder / "later.png").write_bytes(png(1))
    again = open_pictures(["pictures/rows.jsonl"]), open_pictures(["pictures/bytes.parquet"])
    assert [again[0].stamp(i) == before[0][i] for i in range(3)] == [True, False, True]
    assert again[1].stamp(0) != before[1]


def test_pairs_are_two_pictures_each_the_preferred_one_first(folder: Path):
    table = {
        "caption": ["x", "y"],
        "jpg_0": [png(1), png(2)],
        "jpg_1": [png(3), png(4)],
        "label_0": [1.0, 0.3],
    }
    pq.write_table(pa.table(table), folder / "pairs.parquet")
    pairs = PairPictures("pictures/pairs.parquet")
    assert [read_picture(pairs, i).getpixel((0, 0))[0] for i in range(4)] == [1, 3, 4, 2]
    assert pairs.files == [f"pairs.parquet, row {r}, jpg_{c}" for r, c in ((0, 0), (0, 1), (1, 1), (1, 0))]
    assert pairs.prompts(required=True) == ["x", "x", "y", "y"]

    line = {"prompt": "x", "chosen": "b.png", "rejected": "a.png"}
    (folder / "pairs.jsonl").write_text(json.dumps(line))
    files = PairPictures("pictures/pairs.jsonl")
    assert [read_picture(files, i).getpixel((0, 0))[0] for i in range(2)] == [20, 10]
    before = [files.stamp(i) for i in range(2)]
    (folder / "a.png").write_bytes(png(200) + b"longer")
    assert [files.stamp(i) == before[i] for i in range(2)] == [True, False]


@pytest.mark.parametrize(
    ("paths", "match"),
    [
        (["absent"], r"no such file or folder[^$]*absent[^$]*looked from"),
        (["absent/*.png"], r"no file matches the pattern[^$]*absent/\*\.png"),
        (["pictures/*.md"], r"no picture matches the pattern[^$]*it matches notes\.md"),
        (["absent.jsonl"], "file not found"),
        (["absent-*.parquet"], "no file matches the pattern"),
        (["pictures/a.png", "gone.png"], r"1 of 2 files not found[^$]*gone\.png"),
        (["pictures/notes.md"], r"not pictures by their names[^$]*notes\.md"),
        (["pictures/a.png", "pictures/sub/c.png", "pictures/notes.md"], "picture files only"),
        (["bundled:image.parquet"], r"did you mean bundled:images\.parquet"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, paths: list[str], match: str):
    with pytest.raises(DataError, match=match):
        open_pictures(paths)


def test_missing_columns_name_those_found(folder: Path):
    (folder / "rows.jsonl").write_text('{"url": "a.png", "score": 1}')
    with pytest.raises(DataError, match=r"no column any of image, [^$]*found: url, score"):
        open_pictures(["pictures/rows.jsonl"])
    (folder / "rows.jsonl").write_text('{"image": "a.png", "score": 1}')
    pictures = open_pictures(["pictures/rows.jsonl"])
    assert pictures.prompts(required=False) == [None]
    with pytest.raises(DataError, match=r"no column any of prompt, [^$]*found: image, score"):
        pictures.prompts(required=True)


def test_missing_prompts_name_their_rows(folder: Path):
    rows = [
        {"image": "a.png", "prompt": "x"},
        {"image": "b.png", "prompt": " "},
        {"image": "c", "prompt": None},
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pictures = open_pictures(["pictures/rows.jsonl"])
    assert pictures.prompts(required=False) == ["x", None, None]
    with pytest.raises(
        DataError, match=r"2 of 3 pictures have no prompt[^$]*rows\.jsonl:2[^$]*rows\.jsonl:3"
    ):
        pictures.prompts(required=True)


def test_sidecars_beside_files_of_a_pattern(folder: Path):
    (folder / "a.txt").write_text("one\n")
    pictures = open_pictures(["pictures/*.png"])
    assert pictures.prompts(required=False) == [None, None]
    with pytest.raises(DataError, match=r"1 of 2 pictures have no prompt[^$]*pictures/b\.png"):
        pictures.prompts(required=True)
    (folder / "b.txt").write_text("two")
    assert pictures.prompts(required=False) == ["one", "two"]


def test_metadata_must_list_the_pictures_that_are_there(folder: Path):
    (folder / "odd.ppm").write_bytes(b"")
    rows = [{"file_name": name, "text": "x"} for name in ("a.png", "b.png", "sub/c.png", "odd.ppm")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"lists 4 pictures, the folder has 3"):
        open_pictures(["pictures"]).prompts(required=True)


def test_text_that_utf8_cannot_hold_becomes_escapes(folder: Path):
    assert storable("é \ud800") == "é \\ud800"
    (folder / "rows.jsonl").write_text(json.dumps({"image": "a.png", "prompt": "half \ud800"}))
    assert prompts_for(open_pictures(["pictures/rows.jsonl"]), None, True) == ["half \\ud800"]
    (folder / os.fsdecode(b"latin\xe9.png")).write_bytes(png(1))
    names = open_pictures(["pictures"]).files
    assert "latin\\udce9.png" in names
