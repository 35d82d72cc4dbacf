from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.config import PairsConfig
from diffalign.data.preferences import PairSet, PreferencePairs
from diffalign.errors import DataError


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def levels(pairs: PairSet, index: int) -> tuple[int, int]:
    winner, loser = pairs.load(index, 4)
    assert winner.shape == loser.shape == (3, 4, 4)
    assert winner.dtype == torch.float32
    return round(winner.mean().item() * 255), round(loser.mean().item() * 255)


def write(path: Path, labels: list[Any], **columns: list[Any]) -> str:
    """Pick-a-Pic columns; row i shows grey 2 i against grey 2 i + 1."""
    n = len(labels)
    table = {
        "caption": [f"prompt {i}" for i in range(n)],
        "jpg_0": [png(2 * i) for i in range(n)],
        "jpg_1": [png(2 * i + 1) for i in range(n)],
        "label_0": labels,
        **columns,
    }
    pq.write_table(pa.table(table), path)
    return str(path)


def whole(path: str) -> PairsConfig:
    return PairsConfig(path=path, validation_fraction=0.0)


def error_of(config: PairsConfig, ties: Any = "drop") -> DataError:
    with pytest.raises(DataError) as caught:
        PreferencePairs(config, ties)
    return caught.value


def test_the_preferred_picture_comes_first_and_ties_are_dropped(tmp_path: Path):
    pairs = PreferencePairs(whole(write(tmp_path / "a.parquet", [1.0, 0.0, 0.5, 0.25])), "drop")
    assert [pairs.train.prompt(i) for i in range(len(pairs.train))] == ["prompt 0", "prompt 1", "prompt 3"]
    assert [levels(pairs.train, i) for i in range(3)] == [(0, 1), (3, 2), (7, 6)]
    assert [pairs.train.probability(i) for i in range(3)] == [1.0, 1.0, 0.75]
    assert len(pairs.validation) == 0


def test_soft_ties_stay_with_probability_one_half(tmp_path: Path):
    pairs = PreferencePairs(whole(write(tmp_path / "a.parquet", [1.0, 0.5, 0.0])), "soft")
    assert [pairs.train.probability(i) for i in range(len(pairs.train))] == [1.0, 0.5, 1.0]
    assert levels(pairs.train, 1) == (2, 3)


def test_pairs_without_a_label_are_ties(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [1.0, 1.0, None], has_label=[True, False, False])
    assert len(PreferencePairs(whole(path), "drop").train) == 1
    soft = PreferencePairs(whole(path), "soft").train
    assert [soft.probability(i) for i in range(3)] == [1.0, 0.5, 0.5]


def test_another_judges_labels_have_their_own_column(tmp_path: Path):
    path = write(
        tmp_path / "a.parquet",
        [1.0, 1.0, 0.0],
        has_label=[True, False, True],
        margin=[0.1, 0.2, 0.3],
        label_model=[0.0, 1.0, 0.5],
    )
    people = PreferencePairs(whole(path), "drop").train
    assert [levels(people, i) for i in range(len(people))] == [(0, 1), (5, 4)]
    model = PreferencePairs(
        PairsConfig(path=path, validation_fraction=0.0, label_column="label_model"), "drop"
    ).train
    assert [levels(model, i) for i in range(len(model))] == [(1, 0), (2, 3)]
    assert (people.has_margins, model.has_margins) == (True, False)


def test_a_label_column_that_is_missing_is_named_with_those_there(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [1.0])
    error = error_of(PairsConfig(path=path, label_column="label_model"))
    assert error.why == "found: caption, jpg_0, jpg_1, label_0"
    assert error.hint == "pairs need the columns jpg_0, jpg_1, label_model (data.label_column)"


def test_integer_labels_and_struct_pictures_are_read(tmp_path: Path):
    structs = [[{"bytes": png(level), "path": "x.jpg"}] for level in (10, 20)]
    path = write(tmp_path / "a.parquet", [0], jpg_0=structs[0], jpg_1=structs[1])
    assert levels(PreferencePairs(whole(path), "drop").train, 0) == (20, 10)


def test_binarized_parquet_has_winner_and_loser(tmp_path: Path):
    table = {"prompt": ["a"], "chosen": [png(9)], "rejected": [png(4)]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    train = PreferencePairs(whole(str(tmp_path / "a.parquet")), "drop").train
    assert (train.prompt(0), train.probability(0), levels(train, 0)) == ("a", 1.0, (9, 4))


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_jsonl_paths_are_relative_to_the_file(tmp_path: Path, label: float):
    (tmp_path / "pictures").mkdir()
    for level in (3, 5):
        (tmp_path / "pictures" / f"{level}.png").write_bytes(png(level))
    names = ["pictures/3.png", "pictures/5.png"]
    binarized = {"prompt": "a", "chosen": names[0], "rejected": names[1]}
    labelled = {"caption": "a", "jpg_0": names[0], "jpg_1": names[1], "label_0": label}
    for line, expected in ((binarized, (3, 5)), (labelled, (3, 5) if label else (5, 3))):
        (tmp_path / "a.jsonl").write_text(json.dumps(line) + "\n")
        assert levels(PreferencePairs(whole(str(tmp_path / "a.jsonl")), "drop").train, 0) == expected


def test_pairs_of_one_prompt_are_on_one_side_and_the_share_is_kept(tmp_path: Path):
    # 1000 prompts, two pairs each: binomial(1000, 0.2) has a standard deviation of 12.6 prompts
    captions = [f"prompt {i}" for i in range(1000)] + [f" Prompt  {i} " for i in range(1000)]
    path = write(
        tmp_path / "a.parquet", [1.0] * 2000, caption=captions, jpg_0=[b""] * 2000, jpg_1=[b""] * 2000
    )
    pairs = PreferencePairs(PairsConfig(path=path, validation_fraction=0.2), "drop")

    def prompts(pair_set: PairSet) -> list[str]:
        return [" ".join(pair_set.prompt(i).lower().split()) for i in range(len(pair_set))]

    train, validation = prompts(pairs.train), prompts(pairs.validation)
    assert len(train) + len(validation) == 2000
    assert not set(train) & set(validation)
    assert abs(len(set(validation)) - 200) < 4 * 12.6


def test_the_split_of_a_prompt_does_not_depend_on_the_rest_of_the_table(tmp_path: Path):
    few, many = ([f"prompt {i}" for i in range(n)] for n in (100, 300))
    held_out = []
    for name, captions in (("few", few), ("many", many[::-1])):
        n = len(captions)
        empty = [b""] * n
        path = write(tmp_path / f"{name}.parquet", [1.0] * n, caption=captions, jpg_0=empty, jpg_1=empty)
        validation = PreferencePairs(PairsConfig(path=path), "drop").validation
        held_out.append({validation.prompt(i) for i in range(len(validation))})
    assert held_out[0]
    assert held_out[0] == held_out[1] & set(few)


def test_a_validation_file_is_held_out_whole_and_without_ties(tmp_path: Path):
    train = write(tmp_path / "train.parquet", [1.0] * 5)
    held_out = write(tmp_path / "held.parquet", [0.0, 0.5], caption=["x", "y"])
    pairs = PreferencePairs(PairsConfig(path=train, validation_path=held_out), "soft")
    assert len(pairs.train) == 5
    assert [pairs.validation.prompt(i) for i in range(len(pairs.validation))] == ["x"]
    assert levels(pairs.validation, 0) == (1, 0)


@pytest.mark.parametrize("label", [1.5, -0.1, float("nan"), None])
def test_a_label_that_is_no_probability_names_its_row(tmp_path: Path, label: float | None):
    error = error_of(whole(write(tmp_path / "a.parquet", [1.0, label])))
    assert error.what == "label is not a probability"
    assert error.where == f"{tmp_path / 'a.parquet'}, row 1, label_0"


@pytest.mark.parametrize("ties", ["drop", "soft"])
def test_only_ties_are_refused(tmp_path: Path, ties: str):
    assert error_of(whole(write(tmp_path / "a.parquet", [0.5, 0.5])), ties).what == "every pair is a tie"


def test_nothing_left_to_train_on_is_refused(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [1.0, 1.0])
    error = error_of(PairsConfig(path=path, validation_fraction=1 - 1e-9))
    assert error.what == "no pairs left to train on"


def test_missing_columns_list_those_present(tmp_path: Path):
    pq.write_table(pa.table({"caption": ["a"], "jpg_0": [b""], "label_0": [1.0]}), tmp_path / "a.parquet")
    error = error_of(whole(str(tmp_path / "a.parquet")))
    assert error.what == "not a table of preference pairs"
    assert error.why == "found: caption, jpg_0, label_0"
    pq.write_table(pa.table({"chosen": [b""], "rejected": [b""]}), tmp_path / "b.parquet")
    assert error_of(whole(str(tmp_path / "b.parquet"))).what == "no column any of caption, prompt, text"


def test_a_prompt_that_is_not_text_names_its_row(tmp_path: Path):
    error = error_of(whole(write(tmp_path / "a.parquet", [1.0, 1.0], caption=["a", None])))
    assert error.where == f"{tmp_path / 'a.parquet'}, row 1"


def test_missing_files_and_unknown_formats_are_data_errors(tmp_path: Path):
    line = {"prompt": "a", "chosen": "gone.png", "rejected": "gone too.png"}
    (tmp_path / "a.jsonl").write_text(json.dumps(line))
    error = error_of(whole(str(tmp_path / "a.jsonl")))
    assert error.what == "2 pictures not found"
    assert error.where == f"{tmp_path / 'gone.png'}\n{tmp_path / 'gone too.png'}"
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    assert error_of(whole(str(tmp_path / "a.xlsx"))).what == "unknown table format"
    assert error_of(whole(str(tmp_path / "gone.parquet"))).what == "file not found"
    assert error_of(whole(str(tmp_path))).what == "a folder where a file is needed"


def test_an_unreadable_picture_names_row_and_column(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [1.0], jpg_1=[b"bad"])
    with pytest.raises(DataError, match=r"unreadable picture[^$]*a\.parquet, row 0, jpg_1"):
        PreferencePairs(whole(path), "drop").train.load(0, 8)


def test_margins_belong_to_the_first_picture_of_each_pair(tmp_path: Path):
    path = write(tmp_path / "a.parquet", [1.0, 0.0], margin=[0.25, -0.5])
    pairs = PreferencePairs(whole(path), "drop").train
    assert pairs.has_margins
    assert [pairs.margin(i) for i in range(2)] == [0.25, 0.5]
    without = PreferencePairs(whole(write(tmp_path / "b.parquet", [1.0])), "drop").train
    assert not without.has_margins
    with pytest.raises(ValueError, match="no margins"):
        without.margin(0)


@pytest.mark.parametrize("margin", [None, float("nan")])
def test_a_margin_that_is_no_number_names_its_row(tmp_path: Path, margin: float | None):
    error = error_of(whole(write(tmp_path / "a.parquet", [1.0, 1.0], margin=[0.5, margin])))
    assert error.what == "margin is not a number"
    assert error.where == f"{tmp_path / 'a.parquet'}, row 1, margin"


def test_what_other_methods_learn_from_is_named(tmp_path: Path):
    (tmp_path / "prompts.txt").write_text("a star\n")
    assert "list of prompts" in str(error_of(whole(str(tmp_path / "prompts.txt"))).why)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a star"}\n')
    assert "prompts alone" in str(error_of(whole(str(tmp_path / "prompts.jsonl"))).hint)
    pq.write_table(pa.table({"image": [png(1)], "text": ["a"]}), tmp_path / "images.parquet")
    assert "captioned pictures are what sft" in str(error_of(whole(str(tmp_path / "images.parquet"))).hint)
    assert "folder of captioned pictures" in str(error_of(whole(str(tmp_path))).why)
