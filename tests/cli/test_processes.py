"""`--processes N`: real processes that find each other over loopback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from diffalign.cli import main


@pytest.fixture
def run_file(tmp_path: Path, tiny_pipeline_dir: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    (tmp_path / "mine.py").write_text("def bright(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    sampler = {"steps": 3, "guidance_scale": 1.0}
    config = {
        "model": {"path": str(tiny_pipeline_dir), "lora": {"rank": 2}},
        "algorithm": {
            "name": "ddpo",
            "prompts_per_iteration": 4,
            "group_size": 2,
            "advantage": "prompt",
            "prompt_min_count": 2,
        },
        "data": {"path": str(tmp_path / "prompts.txt")},
        "rewards": [{"name": f"{tmp_path / 'mine.py'}:bright", "label": "bright"}],
        "sampler": sampler,
        "training": {"iterations": 2, "device": "cpu"},
        "evaluation": {
            "sets": {"known": str(tmp_path / "prompts.txt")},
            "prompts_per_set": 3,
            "sampler": {**sampler, "eta": 0.0},
        },
    }
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def train(run_file: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "diffalign",
        "train",
        str(run_file),
        "--output-dir",
        str(folder),
        *options,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def test_two_processes_sample_and_score_what_one_does(run_file, tmp_path):
    runs = {}
    for count in (1, 2):
        folder = tmp_path / f"run-{count}"
        done = train(run_file, folder, "--processes", str(count))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("same prompts, same seeds") == 1  # one process talks
        summary = json.loads((folder / "summary.json").read_text())
        first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
        runs[count] = summary, first, json.loads((folder / "samples" / "before.json").read_text())
    assert runs[2][0]["processes"] == 2
    one, two = runs[1][2]["known"], runs[2][2]["known"]
    assert two["prompts"] == one["prompts"] == ["one", "two", "three"]
    assert two["seeds"] == one["seeds"]
    assert two["scores"]["bright"] == pytest.approx(one["scores"]["bright"], abs=1e-5)
    for metric in ("reward/mean", "reward/std", "reward/group_std"):
        assert runs[2][1][metric] == pytest.approx(runs[1][1][metric], abs=1e-5)
    # Both processes stepped with the same averaged gradient: their weights, and so the results, agree.
    after = json.loads((tmp_path / "run-2" / "samples" / "after.json").read_text())["known"]["scores"][
        "bright"
    ]
    assert len(after) == 3


def test_an_error_in_all_processes_is_one_screen_with_its_exit_code(run_file, tmp_path):
    done = train(run_file, tmp_path / "run", "--processes", "2", "--model.path", str(tmp_path / "nowhere"))
    assert done.returncode == 5
    assert done.stderr.count("does not exist") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_two_processes_share_a_comparison_and_score_what_one_does(
    run_file, tiny_pipeline_dir, tmp_path, capfd
):
    words = [
        "compare",
        f"one={tiny_pipeline_dir}",
        f"two={tiny_pipeline_dir}",
        "--device",
        "cpu",
        "--steps",
        "2",
    ]
    words += ["--prompts", str(tmp_path / "prompts.txt"), "--rewards", f"{tmp_path / 'mine.py'}:bright"]
    words += ["--embedding", "bundled:clip", "--distance-prompts", "0", "--guidance-scale", "1"]
    found = []
    for count in (1, 2):
        out = tmp_path / f"compare-{count}"
        assert main([*words, "--output-dir", str(out), "--processes", str(count)]) == 0
        said = capfd.readouterr()
        assert said.out.count("prompts: 4 pictures of 4 prompts") == 1, (
            said.err
        )  # one process speaks for both
        found.append([json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()])
    assert len(list((tmp_path / "compare-2" / "scores").iterdir())) == 2  # each wrote its own share
    label = f"{tmp_path / 'mine.py'}:bright"
    assert [row["file"] for row in found[0]] == [row["file"] for row in found[1]]
    assert [row[label] for row in found[0]] == pytest.approx([row[label] for row in found[1]], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint_and_the_same_command_goes_on(
    run_file, tmp_path, number, code
):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "diffalign", "train", str(run_file), "--output-dir", str(folder)]
    command += ["--processes", "2", "--training.iterations", "500", "--training.checkpoint_every", "100"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        while not (folder / "metrics.jsonl").exists() and child.poll() is None:
            time.sleep(0.1)
        child.send_signal(number)
        said = child.communicate(timeout=60)[0]
        assert child.returncode == code, said
    assert "is written; the same command goes on from there" in said
    assert "Traceback" not in said
    (kept,) = (folder / "checkpoints").iterdir()
    done = int(kept.name.split("-")[1])
    changed = [*command[:-4], "--training.iterations", str(done + 1)]
    again = subprocess.run(changed, capture_output=True, text=True, timeout=250, check=False)
    assert again.returncode == 0, again.stderr
    assert f"resumed after iteration {done}" in again.stdout
