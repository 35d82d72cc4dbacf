"""A run that a guard ends: in good order, with its best weights, and the same if it was killed just then."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from diffalign.config import RUNS, Run
from diffalign.training.run import align


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("a\nb\nc\nd\n")
    (folder / "mine.py").write_text(
        "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
        "def contrast(images, prompts):\n    return images.std(dim=(1, 2, 3))\n"
    )
    return folder


def make(folder, model, iterations: int = 20, **guards: object) -> Run:
    """DDPO whose groups differ less than at first sooner or later: with random weights, by chance."""
    return RUNS["ddpo"].model_validate(
        {
            "model": {"path": str(model), "lora": {"rank": 2}},
            "algorithm": {
                "name": "ddpo", "prompts_per_iteration": 2, "group_size": 2, "sample_batch_size": 4,
                "train_batch_size": 4,
            },
            "data": {"path": str(folder / "prompts.txt")},
            "sampler": {"steps": 3, "guidance_scale": 1.0},
            "rewards": [
                {"name": f"{folder / 'mine.py'}:brightness", "label": "brightness"},
                {"name": f"{folder / 'mine.py'}:contrast", "label": "contrast", "weight": 0.0},
            ],
            "training": {"iterations": iterations, "checkpoint_every": 1, "device": "cpu"},
            "guards": {"window": 3, "patience": 1, "min_group_std": 0.9, **guards},
        }
    )  # fmt: skip


def lines(run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_an_alarm_ends_the_run_with_the_checkpoint_that_was_best_by_the_watched_reward(
    folder, tiny_pipeline_dir, tmp_path, capsys
):
    config, run = make(folder, tiny_pipeline_dir, on_alarm="stop"), tmp_path / "run"
    summary = align(config, run)
    said, done = capsys.readouterr().out, summary["iterations"]
    assert 3 < done < 20
    assert "alarm: rewards inside groups differ by" in said
    assert summary["alarms"] == [
        {"iteration": done, "name": "reward/group_std", "what": summary["ended_early"]["why"]}
    ]
    best = max(lines(run), key=lambda line: line["reward/contrast"])["iteration"]
    assert summary["ended_early"]["weights_of_iteration"] == best
    assert f"ended after iteration {done}, final/ is that of iteration {best}" in said
    kept = load_file(run / "checkpoints" / f"step-{best}" / "trainable.safetensors")
    final = load_file(next((run / "final").glob("*.safetensors")))
    assert sorted(value.sum().item() for value in final.values()) == pytest.approx(
        sorted(value.sum().item() for value in kept.values())
    )

    again = tmp_path / "killed"  # after the last checkpoint, before the end
    shutil.copytree(run, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "final")
    resumed = align(config, again)
    assert resumed["iterations"] == done
    assert resumed["ended_early"] == summary["ended_early"]
    assert resumed["alarms"] == summary["alarms"]


def test_a_warning_changes_nothing_in_the_run(folder, tiny_pipeline_dir, tmp_path, capsys):
    align(make(folder, tiny_pipeline_dir, 8), tmp_path / "warns")
    assert "alarm: rewards inside groups differ by" in capsys.readouterr().out
    silent = align(make(folder, tiny_pipeline_dir, 8, on_alarm="off"), tmp_path / "silent")
    assert "alarm" not in capsys.readouterr().out
    assert silent["alarms"] == []
    time = ("seconds",)
    runs = [
        [{key: value for key, value in line.items() if key not in time} for line in lines(tmp_path / name)]
        for name in ("warns", "silent")
    ]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 8
