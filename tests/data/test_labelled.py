from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.config import KTOConfig, KTORun, LabelledConfig, PairsConfig
from diffalign.data.labelled import LabelledImages
from diffalign.data.preferences import PreferencePairs
from diffalign.errors import DataError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def table(path: Path, **columns: list[Any]) -> str:
    pq.write_table(pa.table(columns), path)
    return str(path)


def read(path: str, **options: Any) -> LabelledImages:
    return LabelledImages(LabelledConfig(path=path, **options))


def error_of(path: str, **options: Any) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return caught.value


def level(images: LabelledImages, index: int) -> int:
    picture = images.load(index, 4)
    assert picture.shape == (3, 4, 4)
    return round(picture.mean().item() * 255)


@pytest.mark.parametrize("labels", [[True, False, True], [1, 0, 1], [1.0, 0.0, 1.0]])
def test_a_parquet_table_has_pictures_captions_and_labels(tmp_path: Path, labels: list[Any]):
    path = table(
        tmp_path / "a.parquet", image=[png(i) for i in range(3)], text=["a", " b ", "c"], label=labels
    )
    images = read(path)
    assert len(images) == 3
    assert images.labels == [True, False, True]
    assert [images.caption(i) for i in range(3)] == ["a", "b", "c"]
    assert [level(images, i) for i in range(3)] == [0, 1, 2]
    assert images.describe() == "3 labelled pictures (2 liked, 1 disliked)"
    assert images.pictures_per_label == 1


def test_jsonl_paths_are_relative_and_a_folder_has_metadata(tmp_path: Path):
    lines = []
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(png(i + 5))
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}", "label": i == 0}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    for path in (str(tmp_path), str(tmp_path / "metadata.jsonl")):
        images = read(path)
        assert images.labels == [True, False]
        assert [level(images, i) for i in range(2)] == [5, 6]


def test_pairs_are_refused_and_told_what_they_are_for(tmp_path: Path):
    path = table(tmp_path / "a.parquet", caption=["a"], jpg_0=[png(1)], jpg_1=[png(2)], label_0=[1.0])
    error = error_of(path)
    assert error.what == "preference pairs where single labelled pictures are needed"
    assert "algorithm.name: dpo" in (error.hint or "")
    assert "data.from_pairs: true" in (error.hint or "")
    assert (
        error_of(table(tmp_path / "b.parquet", prompt=["a"], chosen=[b""], rejected=[b""])).what == error.what
    )


def test_captioned_pictures_without_labels_are_refused(tmp_path: Path):
    error = error_of(table(tmp_path / "a.parquet", image=[png(1)], text=["a"]))
    assert error.what == "pictures without labels"
    assert "sft" in (error.hint or "")
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "0.txt").write_text("a")
    assert error_of(str(tmp_path)).what == error.what


def test_from_pairs_gives_each_decided_pair_that_dpo_trains_on_as_two_pictures(tmp_path: Path):
    n = 40
    path = table(
        tmp_path / "a.parquet",
        caption=[f"prompt {i}" for i in range(n)],
        jpg_0=[png(2 * i) for i in range(n)],
        jpg_1=[png(2 * i + 1) for i in range(n)],
        label_0=[[1.0, 0.0, 0.5][i % 3] for i in range(n)],
    )
    images = read(path, from_pairs=True, validation_fraction=0.3)
    pairs = PreferencePairs(PairsConfig(path=path, validation_fraction=0.3), "drop").train
    assert len(images) == 2 * len(pairs)
    assert images.pictures_per_label == 2
    for i in range(len(pairs)):
        liked, disliked = 2 * i, 2 * i + 1
        assert images.caption(liked) == images.caption(disliked) == pairs.prompt(i)
        assert (images.labels[liked], images.labels[disliked]) == (True, False)
        expected = [round(picture.mean().item() * 255) for picture in pairs.load(i, 4)]
        assert [level(images, liked), level(images, disliked)] == expected


def test_from_pairs_takes_the_labels_of_another_judge(tmp_path: Path):
    path = table(
        tmp_path / "a.parquet",
        caption=["a"],
        jpg_0=[png(0)],
        jpg_1=[png(1)],
        label_0=[1.0],
        label_model=[0.0],
    )
    for column, expected in (("label_0", [0, 1]), ("label_model", [1, 0])):
        images = read(path, from_pairs=True, validation_fraction=0.0, label_column=column)
        assert [level(images, index) for index in range(2)] == expected
    with pytest.raises(ValueError, match=r"data\.label_column: belongs to pairs"):
        KTORun(data=LabelledConfig(path=path, label_column="label_model"), algorithm=KTOConfig())


@pytest.mark.parametrize("label", [None, 0.7, "yes", 2])
def test_a_label_that_is_neither_names_its_row(tmp_path: Path, label: Any):
    lines = [{"image": "a.png", "text": "a", "label": True}, {"image": "a.png", "text": "a", "label": label}]
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    error = error_of(str(tmp_path / "a.jsonl"))
    assert error.what == "label is neither true nor false"
    assert error.where == f"{tmp_path / 'a.jsonl'}:2, label"


@pytest.mark.parametrize(("label", "missing"), [(True, "disliked"), (False, "liked")])
def test_pictures_of_one_kind_only_are_refused(tmp_path: Path, label: bool, missing: str):
    error = error_of(table(tmp_path / "a.parquet", image=[png(1)] * 2, text=["a"] * 2, label=[label] * 2))
    assert error.what == f"none of the 2 pictures is {missing}"


def test_missing_captions_and_files_are_named(tmp_path: Path):
    path = table(tmp_path / "a.parquet", image=[png(1)] * 2, text=["a", " "], label=[True, False])
    assert error_of(path).where == f"{tmp_path / 'a.parquet'}, row 1"
    line = {"image": "gone.png", "text": "a", "label": True}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    assert error_of(str(tmp_path / "a.jsonl")).what == "1 pictures not found"


def test_an_unreadable_picture_names_its_row(tmp_path: Path):
    path = table(tmp_path / "a.parquet", image=[png(1), b"bad"], text=["a", "b"], label=[True, False])
    with pytest.raises(DataError, match=r"unreadable picture[^$]*a\.parquet, row 1"):
        read(path).load(1, 8)
