"""An interrupted `diffalign score` loses nothing, and the same command goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from diffalign.cli import main

COUNT = 40  # a first batch of 32 pictures, a second one of 8
REWARD = """
import os, signal
from pathlib import Path

def shade(images, prompts):
    log, order = Path(__file__).with_name("log"), Path(__file__).with_name("order")
    order = order.read_text() if order.exists() else ""
    if log.exists() and order == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if log.exists() and order == "interrupt":
        raise KeyboardInterrupt
    if log.exists() and order == "fail":
        raise RuntimeError("no more tokens")
    shades = (images.mean(dim=(1, 2, 3)) * 255).round().tolist()
    with log.open("a") as file:
        file.write(f"{len(shades)} ")
    return [float("nan") if order == "nan" and shade == 39 else shade for shade in shades]

shade.needs_prompt = False
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pictures/00.png in a shade of 0, ..., and mine.py, whose reward does what the file `order` says."""
    (tmp_path / "pictures").mkdir()
    for i in range(COUNT):
        Image.new("RGB", (8, 8), (i,) * 3).save(tmp_path / "pictures" / f"{i:02}.png")
    (tmp_path / "mine.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ["score", "pictures", "--rewards", "mine.py:shade", "--output", "out.parquet"]


def order(place: Path, what: str) -> None:
    (place / "order").write_text(what)


def calls(place: Path) -> list[int]:
    """Pictures of every call of the reward."""
    return [int(word) for word in (place / "log").read_text().split()]


def shades(place: Path) -> list[float | None]:
    rows = pq.read_table(place / "out.parquet").to_pylist()
    assert [row["file"] for row in rows] == [f"{i:02}.png" for i in range(len(rows))]
    return [row["mine.py:shade"] for row in rows]


def test_a_killed_run_goes_on_where_it_stopped(place: Path):
    order(place, "kill")
    killed = subprocess.run([sys.executable, "-m", "diffalign", *WORDS], cwd=place, env=dict(os.environ))
    assert killed.returncode == -signal.SIGKILL
    assert not (place / "out.parquet").exists()
    with (place / "out.parquet.partial.jsonl").open("a") as file:
        file.write('{"key": "as if it had died wri')
    order(place, "")
    assert main(WORDS) == 0
    assert calls(place) == [32, 8]
    assert shades(place) == list(range(COUNT))
    assert sorted(file.name for file in place.iterdir()) == [
        "log",
        "mine.py",
        "order",
        "out.parquet",
        "pictures",
    ]


@pytest.mark.parametrize(("how", "code"), [("interrupt", 130), ("fail", 6), ("nan", 4)])
def test_whatever_ends_a_run_the_scores_are_kept(
    place: Path, capsys: pytest.CaptureFixture[str], how: str, code: int
):
    order(place, how)
    assert main(WORDS) == code
    shown = capsys.readouterr().err
    assert "the scores of 32 pictures are kept in out.parquet.partial.jsonl" in shown
    assert "Traceback" not in shown
    if how == "fail":
        assert "no more tokens" in shown
    if how == "nan":
        assert "reward mine.py:shade gave nan" in shown
        assert f"39.png of {place / 'pictures'}" in shown
    order(place, "")
    assert main(WORDS) == 0
    assert "going on from out.parquet.partial.jsonl: 32 pictures scored" in capsys.readouterr().err
    assert calls(place) == ([32, 8, 8] if how == "nan" else [32, 8])
    assert shades(place) == list(range(COUNT))


def test_only_what_is_new_or_changed_is_scored_again(place: Path):
    order(place, "fail")
    assert main(WORDS) == 6
    (place / "pictures" / "39.png").unlink()
    Image.new("RGB", (9, 9), (77,) * 3).save(place / "pictures" / "05.png")
    order(place, "")
    assert main(WORDS) == 0
    assert calls(place) == [32, 1, 7]  # 05.png, by its size alone, and 32 to 38
    assert shades(place) == [77 if i == 5 else i for i in range(39)]


def test_other_rewards_do_not_go_on_from_these_scores(place: Path, capsys: pytest.CaptureFixture[str]):
    order(place, "fail")
    assert main(WORDS) == 6
    before = (place / "out.parquet.partial.jsonl").read_bytes()
    capsys.readouterr()
    other = [word.replace("mine.py:shade", "mine.py:shade,jpeg_compressibility") for word in WORDS]
    assert main(other) == 2
    shown = capsys.readouterr().err
    assert "an unfinished run with another rewards has left its scores there" in shown
    assert "out.parquet.partial.jsonl" in shown
    assert "remove the file to start anew" in shown
    assert (place / "out.parquet.partial.jsonl").read_bytes() == before
    assert not (place / "out.parquet").exists()
