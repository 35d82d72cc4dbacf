"""A comparison end to end on tiny checkpoints of the real classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffalign_eval.compare import Comparison, compare, is_comparison
from diffalign_eval.statistics import Interval, WinRate, mean_interval, paired_difference
from PIL import Image

from diffalign.cli import main
from diffalign.config import RewardConfig, SamplerConfig
from diffalign.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NumericsError,
    RewardError,
)
from diffalign.images import to_tensor

PROMPTS = ["a red star", "two blue circles", "a green ring"]
SAMPLER = SamplerConfig(steps=2, eta=0.0, guidance_scale=2.0)


@dataclass
class Setting:
    """What every comparison here has in common."""

    base: str
    brighter: str
    reward: RewardConfig
    output_dir: Path

    def compare(self, **changes: Any) -> Comparison:
        options: dict[str, Any] = {
            "checkpoints": {"base": self.base, "brighter": self.brighter},
            "prompts": PROMPTS,
            "seeds_per_prompt": 2,
            "sampler": SAMPLER,
            "rewards": [self.reward],
            "output_dir": self.output_dir,
            "device": "cpu",
        }
        return compare(**(options | changes))


@pytest.fixture
def setting(tiny_pipeline_dir: Path, brighter_pipeline_dir: Path, brightness: str, tmp_path: Path) -> Setting:
    reward = RewardConfig(name=brightness, label="brightness")
    return Setting(str(tiny_pipeline_dir), str(brighter_pipeline_dir), reward, tmp_path / "out")


@pytest.fixture(scope="module")
def progress() -> list[tuple[str, int, int]]:
    """What `done` told about its progress."""
    return []


@pytest.fixture(scope="module")
def done(
    tiny_pipeline_dir: Path,
    brighter_pipeline_dir: Path,
    brightness: str,
    progress: list[tuple[str, int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Comparison:
    """One comparison that several tests look at: base and brighter, 3 prompts, 2 pictures each."""
    reward = RewardConfig(name=brightness, label="brightness")
    out = tmp_path_factory.mktemp("compare") / "out"
    setting = Setting(str(tiny_pipeline_dir), str(brighter_pipeline_dir), reward, out)
    return setting.compare(base_seed=7, batch_size=4, on_progress=lambda *news: progress.append(news))


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def test_a_brighter_checkpoint_wins_on_brightness(done: Comparison):
    (result,) = done.results
    pair = result.against_baseline("brighter")
    assert pair.difference.low > 0
    assert (pair.win_rate.win, pair.win_rate.rate) == (6, 1.0)
    # The bias moves a picture in [-1, 1] by 0.2, so one in [0, 1] by 0.1 wherever it is not clamped.
    assert pair.difference.mean == pytest.approx(0.1, abs=0.01)


def test_a_checkpoint_compared_with_itself_differs_by_exactly_0_and_wins_exactly_half(setting: Setting):
    (result,) = setting.compare(checkpoints={"one": setting.base, "two": setting.base}).results
    pair = result.pairs[0]
    assert pair.difference == Interval(0.0, 0.0, 0.0, 6)
    assert pair.win_rate == WinRate(win=0, tie=6, loss=0, rate=0.5, low=0.5, high=0.5)


def test_the_scores_are_those_of_the_stored_pictures_with_their_prompts_and_seeds(done: Comparison):
    lines = [json.loads(line) for line in (done.output_dir / "scores.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 3 * 2
    for line in lines:
        with Image.open(done.output_dir / line["file"]) as picture:
            assert line["brightness"] == pytest.approx(to_tensor([picture]).mean().item(), abs=1e-6)
    asked = [(spec.prompt_index, spec.prompt, spec.seed) for spec in done.pictures]
    assert asked == [(i, prompt, 7 + 2 * i + k) for i, prompt in enumerate(PROMPTS) for k in range(2)]
    for name in ("base", "brighter"):
        own = [line for line in lines if line["checkpoint"] == name]
        assert [(line["prompt_index"], line["prompt"], line["seed"]) for line in own] == asked
        assert [line["brightness"] for line in own] == done.scores["brightness"][name]


def test_the_summary_says_what_was_found_and_how(done: Comparison):
    summary = read(done.output_dir / "comparison.json")
    assert [entry["name"] for entry in summary["checkpoints"]] == ["base", "brighter"]
    assert summary["sampler"] == SAMPLER.model_dump()
    assert summary["seeds"] == {"base": 7, "per_prompt": 2}
    assert (summary["prompts"], summary["pictures_per_checkpoint"]) == (3, 6)
    assert {"python", "diffalign", "torch", "diffusers"} <= set(summary["versions"])
    scores = done.scores["brightness"]
    expected = paired_difference(scores["base"], scores["brighter"], np.repeat(range(3), 2))
    assert summary["results"][0]["pairs"][0]["difference"] == expected.to_json()


def test_the_grid_shows_every_checkpoint(done: Comparison):
    with Image.open(done.output_dir / "grid.png") as grid:
        assert grid.width > 3 * 176
        assert grid.height > 2 * 176


def test_each_checkpoints_folder_can_be_scored_by_itself(done: Comparison, brightness: str, tmp_path: Path):
    folder, output = done.output_dir / "brighter", tmp_path / "scores.jsonl"
    words = ["--rewards", brightness, "--output", str(output), "--device", "cpu"]
    assert main(["score", str(folder), *words]) == 0
    again = {line["file"]: line[brightness] for line in map(json.loads, output.read_text().splitlines())}
    in_order = [again[spec.file_name] for spec in done.pictures]
    assert in_order == pytest.approx(done.scores["brightness"]["brighter"], abs=1e-6)


def test_compare_and_sample_draw_the_same_pictures_for_the_same_seed(done: Comparison, tmp_path: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    sampled = tmp_path / "sampled"
    words = ["--model", done.checkpoints["base"], "--prompts", str(prompts), "--output-dir", str(sampled)]
    words += [
        "--device",
        "cpu",
        "--seed",
        "7",
        "--seeds-per-prompt",
        "2",
        "--steps",
        "2",
        "--guidance-scale",
        "2",
    ]
    assert main(["sample", *words]) == 0
    for file in (done.output_dir / "base").iterdir():
        assert file.read_bytes() == (sampled / file.name).read_bytes()


def test_the_batch_size_changes_no_score(setting: Setting, done: Comparison):
    one_by_one = setting.compare(batch_size=1, base_seed=7)
    for name, scores in one_by_one.scores["brightness"].items():
        assert scores == pytest.approx(done.scores["brightness"][name], abs=1e-4)


def test_progress_is_told_after_every_batch(done: Comparison, progress: list[tuple[str, int, int]]):
    assert progress == [("base", 4, 6), ("base", 6, 6), ("brighter", 4, 6), ("brighter", 6, 6)]


def test_a_prompt_that_comes_twice_is_one_cluster(setting: Setting):
    prompts = ["same", "same", "other"]
    comparison = setting.compare(prompts=prompts, seeds_per_prompt=1)
    scores = comparison.scores["brightness"]["base"]
    assert comparison.results[0].means["base"] == mean_interval(scores, prompts) != mean_interval(scores)
    assert read(setting.output_dir / "comparison.json")["prompts"] == 2


def earlier_comparison(folder: Path) -> None:
    (folder / "old").mkdir(parents=True)
    (folder / "comparison.json").write_text(
        '{"kind": "diffalign-comparison", "checkpoints": [{"name": "old"}]}'
    )


def test_an_earlier_comparison_is_replaced(setting: Setting):
    earlier_comparison(setting.output_dir)
    setting.compare(prompts=["alone"], seeds_per_prompt=1)
    assert sorted(path.name for path in setting.output_dir.iterdir()) == [
        "base", "brighter", "comparison.json", "grid.png", "scores.jsonl",
    ]  # fmt: skip
    assert is_comparison(setting.output_dir)
    # One picture gives a difference without an interval.
    difference = read(setting.output_dir / "comparison.json")["results"][0]["pairs"][0]["difference"]
    assert (difference["low"], difference["high"], difference["n"]) == (None, None, 1)


def test_a_comparison_with_anything_else_in_its_folder_is_kept(setting: Setting):
    earlier_comparison(setting.output_dir)
    (setting.output_dir / "notes.txt").write_text("precious")
    with pytest.raises(ConfigError, match="is not empty"):
        setting.compare()
    assert sorted(path.name for path in setting.output_dir.iterdir()) == [
        "comparison.json",
        "notes.txt",
        "old",
    ]


def test_a_failure_half_way_leaves_the_earlier_comparison_and_nothing_else(setting: Setting, tmp_path: Path):
    earlier_comparison(setting.output_dir)

    def stop(name: str, done: int, total: int) -> None:
        if name == "brighter":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setting.compare(on_progress=stop)
    assert sorted(path.name for path in setting.output_dir.iterdir()) == ["comparison.json", "old"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_reward_that_is_not_finite_names_checkpoint_prompt_and_seed(setting: Setting, tmp_path: Path):
    file = tmp_path / "broken.py"
    file.write_text(
        "def score(images, prompts):\n    return [1 if 'red' in p else float('nan') for p in prompts]"
    )
    with pytest.raises(NumericsError, match="checkpoint base, prompt 'two blue circles', seed 2"):
        setting.compare(rewards=[RewardConfig(name=f"{file}:score", label="broken")])
    assert not setting.output_dir.exists()


def test_a_missing_checkpoint_is_noticed_before_any_picture_is_made(setting: Setting):
    told: list[object] = []
    with pytest.raises(CheckpointError, match="does not exist"):
        setting.compare(
            checkpoints={"base": setting.base, "gone": "/no/such/model"},
            on_progress=lambda *news: told.append(news),
        )
    assert told == []
    assert not setting.output_dir.exists()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"checkpoints": {"a": "x"}}, ConfigError, "two checkpoints or more; got 1"),
        ({"checkpoints": {"a": "x", "../b": "y"}}, ConfigError, "'../b' cannot be the name"),
        ({"checkpoints": {"a": "x", "grid.png": "y"}}, ConfigError, "'grid.png' cannot be the name"),
        ({"rewards": [RewardConfig(name="shapes", label="seed")]}, ConfigError, "cannot be labelled seed"),
        ({"prompts": []}, DataError, "no prompts"),
        ({"rewards": [RewardConfig(name="no_such")]}, RewardError, "no reward named no_such"),
        ({"rewards": []}, RewardError, "at least one reward"),
    ],
)
def test_bad_input_leaves_nothing(
    setting: Setting, changes: dict[str, Any], error: type[Exception], message: str
):
    with pytest.raises(error, match=message):
        setting.compare(**changes)
    assert not setting.output_dir.exists()
    assert not list(setting.output_dir.parent.glob(".out*"))
