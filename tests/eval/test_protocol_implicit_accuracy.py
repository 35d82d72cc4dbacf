from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffalign_eval.protocols.implicit_accuracy import implicit_accuracy
from PIL import Image
from torch.testing import assert_close

from diffalign.algorithms.base import Context
from diffalign.algorithms.preference import DPO
from diffalign.cli import run_module
from diffalign.config import DPOConfig, PairsConfig
from diffalign.data.preferences import PreferencePairs
from diffalign.errors import CheckpointError
from diffalign.models.loading import load_for_inference

NAME = "diffalign_eval.protocols.implicit_accuracy"


def picture(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, 255 - shade, 90)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pairs_file(tmp_path: Path) -> str:
    table = {
        "caption": [f"prompt {i}" for i in range(10)],
        "jpg_0": [picture(20 * i) for i in range(10)],
        "jpg_1": [picture(250 - 20 * i) for i in range(10)],
        "label_0": [1.0, 0.0] * 4 + [0.5, 0.9],
    }
    pq.write_table(pa.table(table), tmp_path / "pairs.parquet")
    return str(tmp_path / "pairs.parquet")


def changed(denoiser, factor: float = 1.02):
    with torch.no_grad():
        for parameter in denoiser.trainable_parameters().values():
            parameter.mul_(factor)
    return denoiser


def test_it_is_what_a_training_run_reports_on_its_held_out_pairs(
    pairs_file, make_denoiser, tiny_pipeline_dir
):
    policy = changed(make_denoiser(full=True))
    pairs = PreferencePairs(PairsConfig(path=pairs_file, validation_fraction=0.5), "drop")
    assert len(pairs.validation) >= 3
    options = DPOConfig(batch_size=2, validation_every=1, validation_timesteps=4)
    reported = DPO(options, policy, pairs, Context(seed=7)).validate(1)
    reference = load_for_inference(str(tiny_pipeline_dir), device="cpu")
    found = implicit_accuracy(policy, reference, pairs.validation, timesteps=4, seed=7, batch_size=3)
    assert_close(found.accuracy.mean, reported["validation/accuracy"])
    assert_close(found.margin.mean, reported["validation/margin"], rtol=1e-3, atol=1e-8)
    assert found.accuracy.n == 4 * len(pairs.validation)
    assert list(found.by_timestep) == [125, 375, 625, 875]  # (k + 1/2) 1000 / 4
    assert_close(sum(found.by_timestep.values()) / 4, found.accuracy.mean)


def test_a_policy_that_is_its_reference_agrees_half_of_the_time(pairs_file, tiny_pipeline_dir):
    denoiser = load_for_inference(str(tiny_pipeline_dir), device="cpu")
    pairs = PreferencePairs(PairsConfig(path=pairs_file, validation_fraction=0.0), "drop").train
    found = implicit_accuracy(denoiser, denoiser, pairs, timesteps=2)
    assert (found.accuracy.mean, found.pair_accuracy.mean, found.margin.mean) == (0.5, 0.5, 0.0)
    assert found.pair_accuracy.n == 9  # the tie is left out


def test_swapping_policy_and_reference_mirrors_it(pairs_file, make_denoiser, tiny_pipeline_dir):
    policy = changed(make_denoiser(full=True))
    reference = load_for_inference(str(tiny_pipeline_dir), device="cpu")
    pairs = PreferencePairs(PairsConfig(path=pairs_file, validation_fraction=0.0), "drop").train
    forth = implicit_accuracy(policy, reference, pairs, range(4), timesteps=3)
    back = implicit_accuracy(reference, policy, pairs, range(4), timesteps=3)
    assert forth.margin.mean != 0
    assert_close(forth.margin.mean, -back.margin.mean, rtol=1e-4, atol=1e-9)
    assert_close(forth.accuracy.mean, 1 - back.accuracy.mean)


def test_checkpoints_that_predict_different_things_are_refused(
    tiny_pipeline_dir, tiny_v_pipeline_dir, pairs_file
):
    first, second = (
        load_for_inference(str(path), device="cpu") for path in (tiny_pipeline_dir, tiny_v_pipeline_dir)
    )
    pairs = PreferencePairs(PairsConfig(path=pairs_file, validation_fraction=0.0), "drop").train
    with pytest.raises(CheckpointError, match="do not go together"):
        implicit_accuracy(first, second, pairs)


def test_the_command_takes_held_out_pairs_and_writes_its_numbers(
    pairs_file, tiny_pipeline_dir, tmp_path, capsys
):
    output = tmp_path / "out.json"
    words = ["--pairs", pairs_file, "--policy", str(tiny_pipeline_dir), "--reference", str(tiny_pipeline_dir)]
    words += ["--device", "cpu", "--timesteps", "2"]
    assert run_module(NAME, [*words, "--held-out", "0.5", "--output", str(output)]) == 0
    held_out = len(PreferencePairs(PairsConfig(path=pairs_file, validation_fraction=0.5), "drop").validation)
    assert f"{held_out} pairs, 2 timesteps" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["accuracy"]["mean"] == 0.5
    assert written["accuracy"]["n"] == 2 * held_out
    assert set(written["by_timestep"]) == {"250", "750"}
    assert run_module(NAME, [*words, "--label-column", "label_model"]) == 3
    assert "pairs need the columns jpg_0, jpg_1, label_model" in capsys.readouterr().err
    assert run_module(NAME, [*words, "--held-out", "2", "--limit", "0"]) == 2
    assert capsys.readouterr().err == (
        "error: --limit must be at least 1; got 0\nerror: --held-out must lie between 0 and 1; got 2\n"
    )
