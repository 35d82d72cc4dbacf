"""What a checkpoint cost, from run folders as `diffalign train` leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffalign_eval.judgement.cost import Cost, Gain, cost_of, run_chain
from diffalign_eval.judgement.run_files import find_run, read_run

from diffalign.config import RUNS
from diffalign.errors import DataError
from diffalign.training.run import align

DDPO: dict[str, Any] = {
    "algorithm": "ddpo",
    "base_model": "bundled:tiny-sd",
    "wall_seconds": 200.0,
    "seconds_by_phase": {"evaluation": 60.0, "sampling": 80.0, "training": 50.0},
    "counts": {
        "sampled_pictures": 2000,
        "training_pictures": 12000,
        "reward_queries": 4000,
        "preference_labels": 0,
        "captions": 0,
        "optimizer_steps": 30,
    },
    "peak_memory_bytes": 1_700_000_000,
    "energy_joules": 5000.0,
    "energy_reason": None,
    "device": "NVIDIA H200",
    "processes": 2,
}
SFT: dict[str, Any] = DDPO | {
    "algorithm": "sft",
    "wall_seconds": 100.0,
    "seconds_by_phase": {"evaluation": 30.0, "validation": 10.0, "training": 50.0},
    "counts": dict.fromkeys(DDPO["counts"], 0) | {"training_pictures": 9000, "captions": 1500},
    "peak_memory_bytes": 900_000_000,
    "device": "1 CPU threads",
    "processes": 1,
    "energy_joules": None,
    "energy_reason": "the driver of a CPU does not tell",
}


def run_folder(path: Path, summary: dict[str, Any] | None, base: str = "bundled:tiny-sd") -> Path:
    (path / "final").mkdir(parents=True)
    name = summary["algorithm"] if summary else "sft"
    path.joinpath("config.yaml").write_text(
        f"algorithm: {{name: {name}}}\nmodel: {{path: '{base}'}}\nseed: 3\n"
    )
    if summary is not None:
        path.joinpath("summary.json").write_text(json.dumps(summary | {"base_model": base}))
    return path


def test_the_cost_of_one_run_is_what_its_summary_says_without_the_evaluations(tmp_path):
    cost = cost_of("ddpo", str(run_folder(tmp_path / "ddpo", DDPO)))
    assert cost == Cost(
        checkpoint="ddpo",
        stages=("ddpo",),
        device="NVIDIA H200",
        seconds=140.0,  # 200 - 60
        device_seconds=280.0,  # two processes
        phases={"evaluation": 60.0, "sampling": 80.0, "training": 50.0},
        processes=2,
        pictures_sampled=2000,
        pictures_trained=12000,
        reward_queries=4000,
        preference_labels=0,
        captions=0,
        peak_memory_bytes=1_700_000_000,
        energy_joules=5000.0,
    )
    assert cost_of("ddpo", str(tmp_path / "ddpo" / "final")) == cost


def test_a_run_that_started_from_another_adds_that_ones_cost(tmp_path):
    sft = run_folder(tmp_path / "sft", SFT)
    cost = cost_of("ddpo", str(run_folder(tmp_path / "ddpo", DDPO, base=str(sft / "final"))))
    assert cost.stages == ("sft", "ddpo")
    assert cost.device == "1 CPU threads, NVIDIA H200"
    assert cost.seconds == 60.0 + 140.0  # 100 - 30 - 10 and 200 - 60
    assert cost.device_seconds == 60.0 + 280.0
    assert cost.phases == {"evaluation": 90.0, "validation": 10.0, "training": 100.0, "sampling": 80.0}
    assert (cost.pictures_sampled, cost.pictures_trained, cost.captions) == (2000, 21000, 1500)
    assert (cost.processes, cost.peak_memory_bytes) == (2, 1_700_000_000)  # the largest, not the sum
    assert cost.energy_joules is None
    assert cost.holes == ("energy of sft: the driver of a CPU does not tell",)


def test_a_relative_starting_point_is_found_from_the_folders_around_the_run(tmp_path):
    sft = run_folder(tmp_path / "runs" / "sft", SFT)
    for number, base in enumerate(("runs/sft", "runs/sft/final")):
        ddpo = run_folder(tmp_path / "runs" / f"ddpo{number}", DDPO, base=base)
        assert run_chain(ddpo) == [sft.resolve(), ddpo.resolve()]


def test_runs_that_start_from_each_other_are_refused(tmp_path):
    for name, base in (("a", "b"), ("b", "c"), ("c", "b")):
        run_folder(tmp_path / name, SFT, base=str(tmp_path / base / "final"))
    with pytest.raises(DataError, match="start from each other") as caught:
        cost_of("a", str(tmp_path / "a"))
    circle = " <- ".join(str(tmp_path.resolve() / name) for name in "bcb")
    assert caught.value.where == circle


@pytest.mark.parametrize("path", ["bundled:tiny-sd", "bundled:nothing", "org/model", "{tmp}", "{tmp}/gone"])
def test_a_checkpoint_of_no_run_is_a_hole_and_no_zero(path, tmp_path):
    cost = cost_of("base", path.format(tmp=tmp_path))
    assert cost.seconds is None
    assert cost.pictures_sampled is None
    assert cost.holes == (f"cost: {path.format(tmp=tmp_path)} is not the result of a training run",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "the run has not finished"),
        ('{"algorithm": "sft"', "cannot be read"),
        ("[1]", "is not a run's summary"),
    ],
)
def test_an_unfinished_stage_leaves_no_partial_sum(text, reason, tmp_path):
    sft = run_folder(tmp_path / "sft", None)
    if text is not None:
        (sft / "summary.json").write_text(text)
    cost = cost_of("ddpo", str(run_folder(tmp_path / "ddpo", DDPO, base=str(sft))))
    assert cost.stages == ("sft", "ddpo")
    assert (cost.seconds, cost.phases, cost.pictures_sampled, cost.energy_joules) == (None, None, None, None)
    (hole,) = cost.holes
    assert hole.startswith("cost of sft: ")
    assert reason in hole


def test_what_an_older_summary_does_not_count_is_a_hole_by_name(tmp_path):
    counts = {"sampled_pictures": 2000, "reward_queries": float("nan")}  # json writes and reads NaN
    cost = cost_of("ddpo", str(run_folder(tmp_path / "ddpo", DDPO | {"counts": counts})))
    assert cost.pictures_sampled == 2000
    assert cost.reward_queries is None
    unknown = ("pictures_trained", "reward_queries", "preference_labels", "captions")
    assert cost.holes == tuple(f"{name}: summary.json of ddpo does not say" for name in unknown)


def test_a_gain_is_divided_by_what_was_spent_and_a_zero_is_no_divisor():
    cost = Cost("x", seconds=120.0, pictures_sampled=4000, reward_queries=None, preference_labels=0)
    priced = cost.with_gains([Gain("in-domain", "shapes", 0.2)])
    (gain,) = priced.per_unit
    assert gain.per_minute == pytest.approx(0.1)  # two minutes
    assert gain.per_1000_pictures == pytest.approx(0.05)  # four thousand
    assert (gain.per_1000_queries, gain.per_1000_labels) == (None, None)
    assert priced.holes == (
        "gain per_1000_queries: reward_queries not known",
        "gain per_1000_labels: no preference labels were used",
    )
    assert cost.with_gains([]) == cost


def test_what_a_checkpoint_is_guided_away_from_counts_too(tmp_path):
    sft, ddpo = (run_folder(tmp_path / name, summary) for name, summary in (("sft", SFT), ("ddpo", DDPO)))
    alone, both = (
        cost_of("x", path) for path in (f"bundled:tiny-sd+negative:{ddpo}", f"{sft}+negative:{ddpo}")
    )
    assert alone == cost_of("x", str(ddpo))
    assert alone.seconds == 140.0  # 200 - 60, as above
    assert both.seconds == 60.0 + 140.0
    assert both.stages == ("sft", "ddpo")


def test_a_cost_is_strict_json(tmp_path):
    known = cost_of("ddpo", str(run_folder(tmp_path / "ddpo", DDPO))).with_gains([Gain("a", "b", 0.1)])
    for cost in (known, Cost("base", holes=("none",))):
        read = json.loads(json.dumps(cost.to_json(), allow_nan=False))
        assert read == cost.to_json()
    assert known.to_json()["per_unit"][0]["per_1000_queries"] == pytest.approx(0.1 / 4)
    assert Cost("base").to_json()["phases"] == {}


def test_a_run_says_which_rewards_it_was_trained_on(tmp_path):
    run = run_folder(tmp_path / "run", DDPO)
    (run / "config.yaml").write_text(
        "algorithm: {name: ddpo}\nmodel: {path: bundled:tiny-sd}\nseed: 7\nsampler: {steps: 10}\nrewards:\n"
        "- {name: clip, weight: 1.0, label: null}\n- {name: jpeg, weight: -0.5, label: bytes}\n"
        "- {name: shapes, weight: 0.0}\n"
    )
    info = read_run(run)
    assert info.to_json() == {
        "folder": str(run),
        "method": "ddpo",
        "training_rewards": ["clip", "bytes"],
        "seed": 7,
    }
    assert info.watched_rewards == ["shapes"]
    assert info.minimised == {"bytes"}
    assert find_run(str(run / "final")) == run.resolve()


def test_a_run_without_a_sampler_learnt_from_no_reward(tmp_path):
    run = run_folder(tmp_path / "run", SFT)
    with (run / "config.yaml").open("a") as stream:
        stream.write("rewards: [{name: shapes, weight: 1.0}]\n")
    assert (read_run(run).training_rewards, read_run(run).watched_rewards) == ([], [])


@pytest.mark.parametrize("text", [": [", "", "- 1", "seed: {}\nalgorithm: x\nrewards: 3"])
def test_a_damaged_config_says_nothing(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    info = read_run(tmp_path)
    assert (info.method, info.base_model, info.seed, info.weights) == (None, None, None, {})


def test_the_cost_of_real_runs_in_a_chain(tiny_pipeline_dir, brightness, tmp_path):
    (tmp_path / "prompts.txt").write_text("a\nb\nc\n")

    def train(name: str, base: Path, inner_epochs: int) -> Path:
        config = RUNS["ddpo"].model_validate(
            {
                "model": {"path": str(base), "lora": None},
                "algorithm": {
                    "name": "ddpo",
                    "prompts_per_iteration": 2,
                    "group_size": 2,
                    "inner_epochs": inner_epochs,
                },
                "data": {"path": str(tmp_path / "prompts.txt")},
                "rewards": [{"name": brightness, "label": "brightness"}],
                "sampler": {"steps": 3, "guidance_scale": 1.0},
                "training": {"iterations": 2, "device": "cpu"},
            }
        )
        align(config, tmp_path / name)
        return tmp_path / name

    second = train("second", train("first", tiny_pipeline_dir, 1) / "final", 2)
    cost = cost_of("second", str(second))
    assert cost.stages == ("ddpo", "ddpo")
    assert cost.pictures_sampled == 2 * 2 * 4  # runs, iterations, pictures
    assert cost.reward_queries == 16
    assert cost.pictures_trained == 2 * 4 * 3 * (1 + 2)  # iterations, pictures, steps, epochs of both runs
    assert (cost.preference_labels, cost.captions, cost.processes) == (0, 0, 1)
    assert cost.seconds > 0
    assert {"sampling", "training", "reward"} <= cost.phases.keys()
    assert cost.holes == ("energy of ddpo: the driver of a CPU does not tell",)
