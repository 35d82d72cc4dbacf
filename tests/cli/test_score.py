"""`diffalign score`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from diffalign.cli.score import Args, run
from diffalign.errors import DataError, DeviceError, DiffalignError, NumericsError, RewardError, StorageError
from diffalign.images import open_image
from diffalign.rewards import load_reward

NAMES = ["a.png", "b.jpg", "sub/c.png"]
MINE = """
def length(images, prompts): return [len(prompt) for prompt in prompts]
def nan_for_b(images, prompts): return [float("nan") if p == "b" else 1.0 for p in prompts]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three noisy pictures of different sizes."""
    root = tmp_path / "pictures"
    rng = np.random.default_rng(0)
    for i, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16 + 8 * i, 20, 3), np.uint8)).save(path)
    return root


@pytest.fixture
def mine(tmp_path: Path) -> str:
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def call(*arguments: object) -> None:
    run(tyro.cli(Args, args=[str(argument) for argument in arguments]))


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_table_has_a_row_for_every_reward(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    call(folder, "--rewards", "jpeg_compressibility,jpeg_incompressibility")
    out = capsys.readouterr().out
    sizes = load_reward("jpeg_incompressibility")([open_image(folder / n, n) for n in NAMES], [""] * 3)
    row = next(line for line in out.splitlines() if "jpeg_incompressibility" in line)
    for number in (sizes.mean(), sizes.std(), sizes.min(), sizes.max()):
        assert f"{number.item():.4g}" in row
    assert row.index(NAMES[int(sizes.argmax())]) < row.index(NAMES[int(sizes.argmin())])
    assert "3 pictures" in out


def test_output_has_one_line_a_picture(folder: Path, tmp_path: Path):
    call(folder, "--rewards", "jpeg_compressibility", "--output", tmp_path / "scores.jsonl")
    rows = lines(tmp_path / "scores.jsonl")
    assert [row["file"] for row in rows] == NAMES
    assert [row["prompt"] for row in rows] == [None] * 3
    expected = load_reward("jpeg_compressibility")([open_image(folder / n, n) for n in NAMES], [""] * 3)
    torch.testing.assert_close(torch.tensor([row["jpeg_compressibility"] for row in rows]), expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "scores.jsonl"]


@pytest.mark.parametrize("source", ["file", "metadata", "sidecars"])
def test_prompts_come_from_each_source(folder: Path, tmp_path: Path, mine: str, source: str):
    prompts = ["one", "three", "seventeen"]
    extra: list[object] = []
    if source == "file":
        (tmp_path / "prompts.txt").write_text("\n".join(prompts))
        extra = ["--prompts", tmp_path / "prompts.txt"]
    elif source == "metadata":
        rows = [{"file_name": n, "text": p} for n, p in zip(NAMES, prompts, strict=True)]
        (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    else:
        for name, prompt in zip(NAMES, prompts, strict=True):
            (folder / name).with_suffix(".txt").write_text(prompt)
    call(folder, "--rewards", f"{mine}:length", "--output", tmp_path / "out.jsonl", *extra)
    rows = lines(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == prompts
    assert [row[f"{mine}:length"] for row in rows] == [3, 5, 9]


def test_options_reach_their_reward(folder: Path):
    with pytest.raises(RewardError, match="the aesthetic head does not exist") as error:
        call(folder, "--rewards", "aesthetic", "--options", "aesthetic.head=/no/such.safetensors")
    assert "/no/such.safetensors" in str(error.value)


def failure(kind: type[DiffalignError], match: str, *arguments: object) -> str:
    with pytest.raises(kind, match=match) as error:
        call(*arguments)
    return str(error.value)


def test_bad_input_is_named(folder: Path, tmp_path: Path, mine: str):
    jpeg = ["--rewards", "jpeg_compressibility"]
    failure(DataError, "folder of pictures does not exist", tmp_path / "absent", *jpeg)
    (tmp_path / "empty").mkdir()
    failure(DataError, "no pictures in this folder", tmp_path / "empty", *jpeg)
    failure(RewardError, "did you mean jpeg_compressibility", folder, "--rewards", "jpeg_compresibility")
    failure(RewardError, "names no reward", folder, "--rewards", ",")
    failure(RewardError, "does not understand clip.x=1", folder, *jpeg, "--options", "clip.x=1")
    failure(RewardError, "x is not an option", folder, *jpeg, "--options", "jpeg_compressibility.x=1")
    failure(StorageError, "cannot write --output", folder, *jpeg, "--output", tmp_path / "no" / "out.jsonl")
    failure(StorageError, "is a folder", folder, *jpeg, "--output", tmp_path)
    failure(DataError, "without a caption|caption", folder, "--rewards", f"{mine}:length")
    (tmp_path / "two.txt").write_text("one\ntwo")
    failure(DataError, "2 prompts but 3 pictures", folder, *jpeg, "--prompts", tmp_path / "two.txt")
    if not torch.cuda.is_available():
        failure(DeviceError, "no GPU", folder, *jpeg, "--device", "cuda")


def test_unreadable_picture_is_named_and_an_older_result_survives(folder: Path, tmp_path: Path):
    output = tmp_path / "out.jsonl"
    output.write_text("older\n")
    (folder / "b.jpg").write_bytes(b"")
    message = failure(
        DataError, "unreadable", folder, "--rewards", "jpeg_compressibility", "--output", output
    )
    assert str(folder / "b.jpg") in message
    assert output.read_text() == "older\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "pictures"]


def test_score_that_is_not_finite_names_the_file(folder: Path, tmp_path: Path, mine: str):
    (tmp_path / "prompts.txt").write_text("a\nb\nc")
    message = failure(
        NumericsError,
        "gave nan",
        folder,
        "--rewards",
        f"{mine}:nan_for_b",
        "--prompts",
        tmp_path / "prompts.txt",
    )
    assert str(folder / "b.jpg") in message
