"""`align` from configuration to result, on the tiny pipeline: what a run writes, resumes and refuses."""

from __future__ import annotations

import io
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffalign.config import RUNS, Run
from diffalign.data.preferences import PreferencePairs
from diffalign.errors import (
    CheckpointError,
    ConfigError,
    DiffalignError,
    NumericsError,
    RewardError,
    StorageError,
)
from diffalign.training.checkpoint import list_checkpoints
from diffalign.training.run import align


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    pictures = []
    for i in range(8):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), (30 * i, 100, 200)).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    prompts = [f"prompt {i}" for i in range(8)]
    pq.write_table(pa.table({"image": pictures, "text": prompts}), folder / "images.parquet")
    columns = {"caption": prompts, "jpg_0": pictures, "jpg_1": pictures[::-1], "label_0": [1.0, 0.0] * 4}
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    (folder / "mine.py").write_text(
        "import torch\n"
        "def brightness(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n"
        "calls = []\n"
        "def breaks(images, prompts):\n"
        "    calls.append(1)\n"
        "    value = float('nan') if len(calls) > 3 else 1.0\n"
        "    return torch.rand(len(prompts)) * value\n"
    )
    return folder


ALGORITHMS = {
    "sft": {"batch_size": 2, "gradient_accumulation": 2},
    "dpo": {"batch_size": 2, "validation_every": 2},
    "ddpo": {"prompts_per_iteration": 2, "group_size": 2, "sample_batch_size": 4, "train_batch_size": 4},
}


def make(data, model, name: str, reward: str = "brightness", **training: object) -> Run:
    files = {"sft": "images.parquet", "dpo": "pairs.parquet", "ddpo": "prompts.txt"}
    config: dict[str, object] = {
        "model": {"path": str(model), "lora": {"rank": 2}},
        "algorithm": {"name": name, **ALGORITHMS[name]},
        "data": {"path": str(data / files[name])},
        "rewards": [{"name": f"{data / 'mine.py'}:{reward}", "label": "brightness"}],
        "training": {"iterations": 4, "checkpoint_every": 2, "device": "cpu", **training},
        "evaluation": {
            "sets": {"known": str(data / "prompts.txt")},
            "prompts_per_set": 4,
            "sampler": {"steps": 2, "eta": 0.0, "guidance_scale": 1.0},
        },
    }
    if name == "dpo":
        config["data"]["validation_fraction"] = 0.3
    if name == "ddpo":
        config["sampler"] = {"steps": 3, "guidance_scale": 1.0}
    return RUNS[name].model_validate(config)


def metrics_of(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_time(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.parametrize("name", ["sft", "dpo", "ddpo"])
def test_a_run_writes_everything_it_promises(data, tiny_pipeline_dir, tmp_path, name):
    config = make(data, tiny_pipeline_dir, name)
    summary = align(config, tmp_path / "run")
    run = tmp_path / "run"
    assert json.loads((run / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step-2", "step-4"]
    assert (run / "final" / "pytorch_lora_weights.safetensors").is_file()
    assert (run / "samples" / "before-after.png").is_file()
    assert (run / "config.yaml").is_file()
    assert [record["iteration"] for record in metrics_of(run) if record["iteration"]] == [1, 2, 3, 4]
    result = summary["results"]["known"]["brightness"]
    assert result["change"]["low"] <= result["change"]["mean"] <= result["change"]["high"]
    assert result["before"]["n"] == 4
    assert summary["peak_memory_bytes"] > 0
    counted = summary["counts"]
    assert counted["optimizer_steps"] == (8 if name == "ddpo" else 4)
    assert counted["training_pictures"] == {"sft": 16, "dpo": 16, "ddpo": 48}[name]  # of RL, three steps each
    assert counted["sampled_pictures"] == counted["reward_queries"] == (16 if name == "ddpo" else 0)
    assert counted["captions"] == (8 if name == "sft" else 0)  # drawn twice each
    pairs = len(PreferencePairs(config.data, "drop").train) if name == "dpo" else 0
    assert counted["preference_labels"] == pairs  # eight draws see each of them
    samples = [record["samples"] for record in metrics_of(run) if record["iteration"]]
    assert samples == [4, 8, 12, 16]
    assert (summary["energy_joules"], summary["energy_reason"]) == (None, "the driver of a CPU does not tell")


@pytest.mark.parametrize("name", ["sft", "dpo", "ddpo"])
def test_a_resumed_run_equals_an_uninterrupted_one(data, tiny_pipeline_dir, tmp_path, name):
    config = make(data, tiny_pipeline_dir, name, ema_decay=0.9, lr_scheduler="linear")
    align(config, tmp_path / "straight")
    run = tmp_path / "cut"
    shutil.copytree(tmp_path / "straight", run)
    # As after a crash in iteration 3: the later checkpoint, result and summary do not exist.
    shutil.rmtree(run / "checkpoints" / "step-4")
    shutil.rmtree(run / "final")
    (run / "summary.json").unlink()
    align(config, run, resume="must")
    assert without_time(metrics_of(run)) == without_time(metrics_of(tmp_path / "straight"))
    file = "final/pytorch_lora_weights.safetensors"
    resumed, straight = load_file(run / file), load_file(tmp_path / "straight" / file)
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_a_damaged_checkpoint_is_passed_over_and_a_named_one_is_refused(
    data, tiny_pipeline_dir, tmp_path, capsys
):
    config = make(data, tiny_pipeline_dir, "sft")
    summary = align(config, tmp_path / "run")
    assert align(config, tmp_path / "run") == json.loads(json.dumps(summary))  # finished: not run again
    newest = tmp_path / "run" / "checkpoints" / "step-4"
    weights = load_file(newest / "trainable.safetensors")
    (tmp_path / "run" / "summary.json").unlink()
    (newest / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not what was written"):
        align(config, tmp_path / "run", resume=newest)
    align(config, tmp_path / "run")
    shown = capsys.readouterr().out.replace("\n", "")
    assert "warning:" in shown
    assert "resumed after iteration 2" in shown
    again = load_file(newest / "trainable.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_going_back_to_a_checkpoint_drops_the_later_ones(data, tiny_pipeline_dir, tmp_path):
    config = make(data, tiny_pipeline_dir, "sft", checkpoint_every=1, keep_every=1, keep_best="-train/loss")
    align(config, tmp_path / "run")
    checkpoints = tmp_path / "run" / "checkpoints"
    assert len(list_checkpoints(checkpoints)) == 4
    longer = make(data, tiny_pipeline_dir, "sft", iterations=2, checkpoint_every=1)
    align(longer, tmp_path / "run", resume=checkpoints / "step-1")
    assert {path.name for path in checkpoints.iterdir()} == {"step-1", "step-2"}
    assert [record["iteration"] for record in metrics_of(tmp_path / "run")] == [1, 2]


def test_resuming_with_another_configuration_is_refused(data, tiny_pipeline_dir, tmp_path):
    align(make(data, tiny_pipeline_dir, "sft"), tmp_path / "run")
    other = make(data, tiny_pipeline_dir, "sft", learning_rate=0.5)
    with pytest.raises(ConfigError, match="not the one") as caught:
        align(other, tmp_path / "run", resume="must")
    assert "learning_rate: 0.5" in caught.value.why


def test_a_run_of_a_version_that_knew_fewer_options_goes_on(data, tiny_pipeline_dir, tmp_path):
    config, run = make(data, tiny_pipeline_dir, "sft"), tmp_path / "run"
    align(config, run)
    old = yaml.safe_load((run / "config.yaml").read_text())
    del old["model"]["adapters"], old["training"]["optimizer"]
    (run / "config.yaml").write_text(yaml.safe_dump(old))
    align(config, run, resume="must")
    assert yaml.safe_load((run / "config.yaml").read_text()) == old


def test_a_folder_in_use_is_refused_and_untouched(data, tiny_pipeline_dir, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match="not empty"):
        align(make(data, tiny_pipeline_dir, "sft"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_there_must_be_a_run_to_resume(data, tiny_pipeline_dir, tmp_path):
    with pytest.raises(ConfigError, match="no run to resume"):
        align(make(data, tiny_pipeline_dir, "sft"), tmp_path / "nothing", resume="must")


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("model", "nowhere/at/all", CheckpointError),
        ("data", "missing.txt", DiffalignError),
        ("reward", "no_such_reward", RewardError),
        ("set", "missing.txt", DiffalignError),
    ],
)
def test_bad_input_leaves_no_folder(data, tiny_pipeline_dir, tmp_path, option, value, error):
    config = make(data, tiny_pipeline_dir, "ddpo").model_dump()
    if option == "reward":
        config["rewards"][0]["name"] = value
    elif option == "set":
        config["evaluation"]["sets"] = {"x": str(tmp_path / value)}
    else:
        config[option]["path"] = str(tmp_path / value)
    with pytest.raises(error):
        align(RUNS["ddpo"].model_validate(config), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_disk_space_is_found_before_training(data, tiny_pipeline_dir, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(StorageError, match="not enough disk space"):
        align(make(data, tiny_pipeline_dir, "sft"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_reward_that_turns_nan_stops_the_run_and_keeps_the_checkpoint(data, tiny_pipeline_dir, tmp_path):
    config = make(data, tiny_pipeline_dir, "ddpo", reward="breaks", checkpoint_every=1)
    with pytest.raises((NumericsError, RewardError)):
        align(config, tmp_path / "run")
    kept = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert kept
    assert not (tmp_path / "run" / "final").exists()


def test_full_fine_tuning_ends_in_a_pipeline_folder(data, tiny_pipeline_dir, tmp_path):
    config = make(data, tiny_pipeline_dir, "sft").model_dump()
    config["model"]["lora"] = None
    config["training"]["mixed_precision"] = "bf16"
    align(RUNS["sft"].model_validate(config), tmp_path / "run")
    assert (tmp_path / "run" / "final" / "model_index.json").is_file()


def test_previews_show_the_same_prompts_beside_the_reference(data, tiny_pipeline_dir, tmp_path):
    align(make(data, tiny_pipeline_dir, "sft", preview_every=2), tmp_path / "run")
    assert (tmp_path / "run" / "samples" / "iteration-2" / "before-after.png").is_file()
