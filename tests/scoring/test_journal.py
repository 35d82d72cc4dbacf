"""Partial scores: what is read back, what is scored again, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.config import RewardConfig
from diffalign.errors import ConfigError, StorageError
from diffalign.scoring.journal import Journal, journal_header, journal_path, picture_keys
from diffalign.scoring.sources import PictureSource, open_pictures

SPECS = [RewardConfig(name="clip", options={"checkpoint": "bundled:clip"})]


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSource:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return open_pictures([str(tmp_path)])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return journal_path(tmp_path / "scores.parquet")


def written(path: Path, pictures: PictureSource) -> Journal:
    journal = Journal(path, journal_header(pictures, SPECS))
    journal.append([("k1", "a.png", [0.25])])
    journal.append([("k2", "b.png", [0.5])])
    return journal


def test_scores_come_back(path: Path, pictures: PictureSource):
    assert path.name == "scores.parquet.partial.jsonl"
    assert written(path, pictures).scores == {"k1": [0.25], "k2": [0.5]}
    again = Journal(path, journal_header(pictures, SPECS))
    assert again.scores == {"k1": [0.25], "k2": [0.5]}
    again.remove()
    assert not path.exists()


def test_no_file_without_scores(path: Path, pictures: PictureSource):
    Journal(path, journal_header(pictures, SPECS))
    assert not path.exists()


@pytest.mark.parametrize("cut", [1, 20])
def test_half_a_line_is_dropped_and_the_next_one_does_not_join_it(
    path: Path, pictures: PictureSource, cut: int
):
    written(path, pictures)
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path, journal_header(pictures, SPECS))
    assert journal.scores == {"k1": [0.25]}
    journal.append([("k3", "c.png", [1.0])])
    assert Journal(path, journal_header(pictures, SPECS)).scores == {"k1": [0.25], "k3": [1.0]}


def test_half_a_header_is_no_scores(path: Path, pictures: PictureSource):
    path.write_text('{"kind": "diffal')
    journal = Journal(path, journal_header(pictures, SPECS))
    journal.append([("k1", "a.png", [1.0])])
    assert Journal(path, journal_header(pictures, SPECS)).scores == {"k1": [1.0]}


def test_other_rewards_options_and_pictures_are_refused_and_named(
    tmp_path: Path, path: Path, pictures: PictureSource
):
    written(path, pictures)
    before = path.read_bytes()
    other = [RewardConfig(name="clip"), RewardConfig(name="aesthetic")]
    with pytest.raises(ConfigError, match="another rewards") as error:
        Journal(path, journal_header(pictures, other))
    assert error.value.why == "rewards then: clip (checkpoint=bundled:clip), now: clip, aesthetic"
    (tmp_path / "sub").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "sub" / "a.png")
    elsewhere = open_pictures([str(tmp_path / "sub")])
    with pytest.raises(ConfigError, match="another input"):
        Journal(path, journal_header(elsewhere, SPECS))
    assert path.read_bytes() == before


def test_the_code_of_a_reward_of_ones_own_is_part_of_the_reward(
    tmp_path: Path, path: Path, pictures: PictureSource
):
    code = tmp_path / "mine.py"
    specs = [RewardConfig(name=f"{code}:f")]
    code.write_text("def f(images, prompts): return [0.0] * len(prompts)")
    Journal(path, journal_header(pictures, specs)).append([("k", "a.png", [0.0])])
    assert Journal(path, journal_header(pictures, specs)).scores
    code.write_text("def f(images, prompts): return [1.0] * len(prompts)")
    with pytest.raises(ConfigError, match=r"another rewards[^$]*code"):
        Journal(path, journal_header(pictures, specs))


def test_files_that_are_not_ours_are_left_alone(path: Path, pictures: PictureSource):
    for text in ('{"my": "file"}\n', "[1]\n"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="no file of partial scores"):
            Journal(path, journal_header(pictures, SPECS))
        assert path.read_text() == text


def test_damage_before_the_last_line_is_an_error(path: Path, pictures: PictureSource):
    written(path, pictures)
    header, *lines = path.read_text().splitlines()
    for broken in ("{", json.dumps({"key": "k"})):
        path.write_text("\n".join([header, broken, *lines]) + "\n")
        with pytest.raises(StorageError, match="damaged"):
            Journal(path, journal_header(pictures, SPECS))


def test_a_picture_is_another_one_when_its_file_or_prompt_changes(tmp_path: Path, pictures: PictureSource):
    first = picture_keys(pictures, ["x", "y"])
    assert picture_keys(pictures, ["x", "y"]) == first
    assert [a == b for a, b in zip(picture_keys(pictures, ["x", "z"]), first, strict=True)] == [True, False]
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    assert [a == b for a, b in zip(picture_keys(pictures, ["x", "y"]), first, strict=True)] == [False, True]
