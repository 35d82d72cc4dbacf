"""A comparison with a checkpoint that is aligned at test time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from diffalign_eval.aligned import unspent
from diffalign_eval.command import named_checkpoints
from diffalign_eval.store import Store, picture_key
from safetensors.torch import load_file, save_file

from diffalign.assets import find_config
from diffalign.cli import main
from diffalign.cli.alignment_args import parse_alignment, split_alignment, split_negative
from diffalign.cli.sampling_args import BUNDLED_WORLD, run_behind
from diffalign.config import RewardConfig
from diffalign.config_file import load_config

REWARDS = """\
def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))
def redness(images, prompts):
    return images[:, 0].mean(dim=(1, 2))
"""
BEST = "best-of-n:n=3,reward=reward.py:brightness"
BOTH = ["--rewards", "reward.py:brightness,reward.py:redness", "--prompts", "prompts.txt"]
QUICK = ["--steps", "2", "--guidance-scale", "2", "--device", "cpu", "--embedding", "./none"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red star\ntwo blue circles\n")
    (tmp_path / "reward.py").write_text(REWARDS)
    return tmp_path


def test_an_aligned_checkpoint_is_compared_like_any_other(
    folder: Path, tiny_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["compare", f"base={tiny_pipeline_dir}", f"best={tiny_pipeline_dir}+{BEST}", *BOTH, *QUICK]
    assert main([*words, "--format", "markdown"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(Path("runs/compare/comparison.json").read_text())
    base, best = found["checkpoints"]
    assert base["alignment"] is None
    assert (best["path"], best["fingerprint"]) == (base["path"], base["fingerprint"])
    assert (best["alignment"]["method"], best["alignment"]["options"]) == ("best-of-n", {"n": 3})
    assert best["key"] != base["key"]
    result = {entry["label"]: entry for entry in found["results"]["prompts"]}
    assert result["reward.py:brightness"]["pairs"][0]["difference"]["mean"] > 0
    # Two steps of three candidates each; the kept picture is decoded once more.
    cost = found["cost"][0]["test_time"]
    assert cost.pop("seconds") > 0
    assert cost == {"denoiser_rows": 6.0, "decoded_pictures": 4.0, "reward_queries": 3.0}
    assert {entry["label"]: entry["held_out"] for entry in found["rewards"]} == {
        "reward.py:brightness": False,
        "reward.py:redness": True,
    }
    (alarm,) = [alarm for alarm in found["alarms"] if alarm["kind"] == "in-sample"]
    assert alarm["checkpoint"] == "best"
    assert "reward.py:brightness chose the pictures themselves" in alarm["text"]
    assert any("aligned at test time" in hole["reason"] for hole in found["holes"])
    assert "in-sample" in shown
    report = Path("runs/compare/report.md").read_text()
    assert "6 denoiser calls (3 reward queries," in report

    before = {file: file.stat().st_mtime_ns for file in Path("runs/compare/pictures").rglob("*.png")}
    assert main(words) == 0  # nothing is drawn again
    assert {file: file.stat().st_mtime_ns for file in Path("runs/compare/pictures").rglob("*.png")} == before
    assert (
        json.loads(Path("runs/compare/comparison.json").read_text())["cost"][0]["test_time"]["denoiser_rows"]
        == 6
    )

    sampled = ["sample", "--model", str(tiny_pipeline_dir), "--prompts", "prompts.txt", "--output-dir", "out"]
    assert main([*sampled, *QUICK[:6], "--align", BEST]) == 0
    drawn = sorted(file.read_bytes() for file in Path("out").glob("*.png"))
    assert drawn == sorted(file.read_bytes() for file in before if best["key"] in str(file))


@pytest.mark.parametrize(
    ("alignment", "more", "code", "message"),
    [
        ("bestof:reward=shapes", [], 2, "bestof is not a method of test-time alignment"),
        ("svdd:reward=shapes", [], 2, "this sampler is deterministic; set --eta 1"),
        ("dno:reward=shapes", [], 6, "dno follows the gradient of the reward, and shapes has none"),
        (BEST, ["--held-out", "reward.py:brightness"], 2, "is what the pictures of x are chosen by"),
    ],
)
def test_bad_input_is_found_before_a_checkpoint_is_loaded(
    folder: Path, capsys: pytest.CaptureFixture[str], alignment: str, more: list[str], code: int, message: str
):
    words = ["compare", "a=/no/such/model", f"x=/no/such/model+{alignment}", *BOTH, *QUICK, *more]
    assert main([*words, "--output-dir", "out"]) == code
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_pictures_are_known_by_method_options_and_rewards(tmp_path: Path):
    texts = [
        "best-of-n:n=3,reward=shapes",
        "best-of-n:n=4,reward=shapes",
        "svdd:reward=shapes",
        "best-of-n:n=3,reward=clip",
        "best-of-n:n=3,reward=clip,clip.checkpoint=bundled:clip",
        "best-of-n:n=3,reward=clip,reward=shapes,shapes.weight=2",
        "best-of-n:n=3,reward=clip,reward=shapes,shapes.weight=3",
    ]
    keys = {picture_key("mark", {"steps": 2}, 16, "no", parse_alignment(text)) for text in texts}
    assert len(keys | {picture_key("mark", {"steps": 2}, 16, "no")}) == len(texts) + 1


def test_costs_of_all_processes_and_batches_are_added(tmp_path: Path):
    store = Store(tmp_path / "out")
    (store.path / "pictures" / "key").mkdir()
    assert store.read_cost("key") == {}
    store.add_cost("key", 0, {"pictures": 8, "seconds": 1.5})
    store.add_cost("key", 0, {"pictures": 2, "seconds": 0.5})
    store.add_cost("key", 1, {"pictures": 8, "seconds": 2.0})
    assert store.read_cost("key") == {"pictures": 18, "seconds": 4.0}


def test_a_checkpoint_without_a_name_is_named_after_its_path_and_its_method():
    entry = "bundled:tiny-sd+best-of-n:n=8,reward=shapes"
    assert named_checkpoints([entry, f"runs/first/final+{BEST}", f"b={entry}"]) == {
        "tiny-sd+best-of-n": entry,
        "first+best-of-n": f"runs/first/final+{BEST}",
        "b": entry,
    }


def test_a_reward_with_other_options_is_another_reward():
    rewards = [
        RewardConfig(name="clip", options={"checkpoint": "bundled:clip"}),
        RewardConfig(name="clip", label="large"),
        RewardConfig(name="shapes"),
    ]
    aligned = {"x": parse_alignment("best-of-n:reward=clip,clip.checkpoint=bundled:clip")}
    assert unspent(rewards, {}, aligned) == ["large", "shapes"]
    assert unspent(rewards, {}, {}) == []  # as before: only rewards that a run watched


def test_a_negative_belongs_to_its_checkpoint_and_can_be_aligned_too():
    negative = "bundled:tiny-sd+negative:runs/npo"
    assert split_negative(negative) == ("bundled:tiny-sd", "runs/npo")
    assert split_negative("runs/a+b") == ("runs/a+b", None)
    assert split_alignment(negative) == (negative, None)
    assert split_alignment(f"{negative}+{BEST}") == (negative, BEST)
    assert list(named_checkpoints([negative, f"{negative}+{BEST}"])) == [
        "tiny-sd+negative",
        "tiny-sd+negative+best-of-n",
    ]


def test_a_run_that_is_only_guided_away_from_says_what_to_measure(tmp_path: Path):
    (tmp_path / "final").mkdir()
    shutil.copy(find_config("tiny/npo"), tmp_path / "config.yaml")
    known = run_behind(["bundled:tiny-sd", f"bundled:tiny-sd+negative:{tmp_path}"])
    assert known is not None
    assert known.rewards == load_config("tiny/npo").rewards
    step = tmp_path / "checkpoints" / "step-3"
    assert run_behind([str(tmp_path / "other"), str(step)]) == known
    no_run = [f"bundled:tiny-sd+negative:{tmp_path / 'gone'}"]
    assert run_behind(no_run) == load_config(BUNDLED_WORLD["bundled:tiny-sd"])


def test_a_checkpoint_guided_by_a_negative_draws_other_pictures(
    folder: Path, tiny_pipeline_dir: Path, capsys: pytest.CaptureFixture[str]
):
    other = folder / "other"
    shutil.copytree(tiny_pipeline_dir, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor * 1.1 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    words = ["compare", f"base={tiny_pipeline_dir}", f"npo={tiny_pipeline_dir}+negative:other", *BOTH, *QUICK]
    assert main(words) == 0
    found = json.loads(Path("runs/compare/comparison.json").read_text())
    base, npo = found["checkpoints"]
    assert npo["fingerprint"] != base["fingerprint"]
    (entry, *_) = found["results"]["prompts"]
    assert entry["pairs"][0]["difference"]["mean"] != 0
    assert main([*words, "--guidance-scale", "1", "--output-dir", "runs/other"]) == 2
    assert "a negative model has no effect at guidance scale 1" in capsys.readouterr().err
