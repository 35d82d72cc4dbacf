"""`diffalign score --pairs`: how often a reward prefers what people preferred."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.cli import main

REWARD = """
def shade(images, prompts): return images.mean(dim=(1, 2, 3)) * 255
shade.needs_prompt = False
def darkness(images, prompts): return shade(images, prompts)
darkness.needs_prompt = False
darkness.higher_is_better = False
"""


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "mine.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_pairs(path: Path, rows: list[tuple[str, bytes, bytes, float]]) -> None:
    names = ("caption", "jpg_0", "jpg_1", "label_0")
    pq.write_table(pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))), path)


def score(*rewards: str) -> list[dict[str, float]]:
    """The agreements that the command writes."""
    named = ",".join(f"mine.py:{reward}" for reward in rewards)
    assert main(["score", "--pairs", "pairs.parquet", "--rewards", named, "--output", "out.jsonl"]) == 0
    return json.loads(Path("out.jsonl.agreement.json").read_text())["rewards"]


def test_accuracy_ties_and_interval(place: Path, capsys: pytest.CaptureFixture[str]):
    rows = [
        ("a", png(2), png(1), 1.0),  # right
        ("b", png(1), png(2), 0.0),  # right
        ("c", png(3), png(1), 0.7),  # right: the favoured one is brighter
        ("d", png(2), png(1), 0.0),  # wrong
        ("e", png(2), png(2), 1.0),  # scores tie: half
        ("f", png(5), png(1), 0.5),  # people tie: apart
        ("g", b"", png(1), 1.0),  # cannot be read
    ]
    write_pairs(place / "pairs.parquet", rows)
    bright, dark = score("shade", "darkness")
    assert (bright["pairs"], bright["score_ties"], bright["label_ties"], bright["skipped"]) == (5, 1, 1, 1)
    assert bright["accuracy"] == pytest.approx(3.5 / 5)
    assert dark["accuracy"] == pytest.approx(1.5 / 5)
    # Wilson, z = 1.959964: (0.7 + 0.384146 -+ 1.959964 sqrt(0.21 / 5 + 0.0384146)) / 1.768292
    assert (bright["low"], bright["high"]) == pytest.approx((0.298792, 0.927415), abs=1e-5)

    written = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["pair"], row["preferred"]) for row in written[2:6]] == [
        (1, 1.0),
        (1, 0.0),
        (2, 0.7),
        (2, 1 - 0.7),
    ]
    assert [row["mine.py:shade"] for row in written[2:6]] == pytest.approx([2, 1, 3, 1])
    assert written[12]["mine.py:shade"] is None
    assert "no picture in this row" in written[12]["skipped"]
    shown = capsys.readouterr()
    assert "agreement with 5 preferences (1 pairs skipped)" in shown.out
    assert "70.0 %" in shown.out
    assert "29.9 to 92.7" in shown.out
    assert "1 more pairs are labelled 0.5" in shown.out
    assert "skipped 1 of 14 pictures" in shown.err


def test_the_labels_of_another_judge(place: Path, capsys: pytest.CaptureFixture[str]):
    write_pairs(place / "pairs.parquet", [("a", png(2), png(1), 1.0), ("b", png(1), png(2), 0.0)])
    pairs = pq.read_table("pairs.parquet")
    pq.write_table(pairs.append_column("label_model", pa.array([0.0, 0.0])), "pairs.parquet")
    words = ["score", "--rewards", "mine.py:shade", "--output", "out.jsonl"]
    for column, accuracy in (("label_0", 1.0), ("label_model", 0.5)):
        assert main([*words, "--pairs", "pairs.parquet", "--label-column", column]) == 0
        (found,) = json.loads(Path("out.jsonl.agreement.json").read_text())["rewards"]
        assert found["accuracy"] == accuracy
    assert main([*words, "pictures", "--label-column", "label_model"]) == 2
    assert "--label-column belongs to --pairs" in capsys.readouterr().err


def test_temperature_and_calibration(place: Path):
    right, wrong = (png(11), png(1), 1.0), (png(1), png(11), 1.0)
    prompts = {"a": [right, right, right, wrong], "b": [right, right, right, wrong]}
    rows = [(prompt, *pair) for prompt, pairs in prompts.items() for pair in pairs]
    write_pairs(place / "pairs.parquet", [*rows, ("c", png(21), png(1), 0.5)])
    (result,) = score("shade")
    # differences of 10, three of four right in either half: sigmoid(10 k) = 3 / 4, and that is how often it is right
    assert result["temperature"] == pytest.approx(math.log(3) / 10, rel=1e-5)
    assert result["calibration_error"] == pytest.approx(0, abs=1e-5)
    expected = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert result["log_likelihood"] == pytest.approx(expected, rel=1e-5)
    assert result["confidence_on_ties"] == pytest.approx(9 / 10, rel=1e-5)  # a difference of 20: odds of 9


def test_a_perfect_reward_has_no_finite_temperature(place: Path, capsys: pytest.CaptureFixture[str]):
    write_pairs(place / "pairs.parquet", [("a", png(2), png(1), 1.0), ("b", png(1), png(9), 0.0)])
    (result,) = score("shade")
    assert result["temperature"] is None
    assert (result["accuracy"], result["log_likelihood"], result["calibration_error"]) == (1, 0, 0)
    assert " inf " in capsys.readouterr().out


def test_a_single_pair_has_no_calibration(place: Path):
    write_pairs(place / "pairs.parquet", [("a", png(2), png(1), 1.0)])
    (result,) = score("shade")
    assert (result["accuracy"], result["log_likelihood"], result["calibration_error"]) == (1, None, None)


def test_jsonl_pairs_of_files(place: Path, capsys: pytest.CaptureFixture[str]):
    for name, shade in (("a.png", 1), ("b.png", 2)):
        (place / name).write_bytes(png(shade))
    line = {"prompt": "x", "chosen": "b.png", "rejected": "a.png"}
    (place / "pairs.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line | {"prompt": "y"}))
    words = ["score", "--pairs", "pairs.jsonl", "--rewards", "mine.py:shade,mine.py:darkness"]
    assert main([*words, "--sheet", "sheet.html"]) == 0
    shown = capsys.readouterr().out
    assert "100.0 %" in shown
    assert "  0.0 %" in shown
    assert "pairs.jsonl:1, chosen" in Path("sheet.html").read_text()


def test_what_is_no_preference_set_is_said(place: Path, capsys: pytest.CaptureFixture[str]):
    words = ["score", "--pairs", "pairs.parquet", "--rewards", "mine.py:shade"]
    assert main(words) == 3
    assert "file not found" in capsys.readouterr().err
    pq.write_table(pa.table({"caption": ["x"], "jpg_0": [png(1)]}), place / "pairs.parquet")
    assert main(words) == 3
    shown = capsys.readouterr().err
    assert "not a table of preference pairs" in shown
    assert "found: caption, jpg_0" in shown
    write_pairs(place / "pairs.parquet", [("a", png(1), png(2), 0.5), ("b", b"", png(2), 1.0)])
    assert main(words) == 3
    assert "no pair is left to compare mine.py:shade with" in capsys.readouterr().err
