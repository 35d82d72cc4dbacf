"""KTO's reference point over gloo: two processes with half the batch each make the run of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import train, warm

from diffalign.config import RUNS, Run


def make(data: Path, model: Path, **algorithm: int) -> Run:
    run = RUNS["kto"].model_validate(
        {
            "model": {"path": str(model), "lora": {"rank": 2}},
            "algorithm": {"name": "kto", "beta": 2000.0, "undesirable_weight": 0.01, **algorithm},
            "data": {"path": str(data / "pairs.parquet"), "from_pairs": True, "validation_fraction": 0.0},
            "training": {"iterations": 5, "learning_rate": 3e-3, "adam_epsilon": 1e-3, "device": "cpu"},
        }
    )
    warm(run)
    return run


@pytest.mark.slow
def test_two_processes_with_half_the_batch_make_the_run_of_one(data, tiny_pipeline_dir, tmp_path):
    """Adam's epsilon keeps the rounding of small gradients from becoming their sign."""
    shapes = {
        "whole": (1, {"batch_size": 8}),
        "half": (2, {"batch_size": 4}),
        "quarter": (2, {"batch_size": 2, "gradient_accumulation": 2}),
    }
    weights, points, losses = {}, {}, {}
    for name, (count, algorithm) in shapes.items():
        folder = tmp_path / name
        codes = train(make(data, tiny_pipeline_dir, **algorithm), folder, count)
        assert codes == [0] * count, folder.with_suffix(".log").read_text()
        tensors = load_file(folder / "checkpoints" / "step-5" / "trainable.safetensors")
        weights[name] = torch.cat([tensors[key].flatten() for key in sorted(tensors) if "lora_B" in key])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        points[name] = [json.loads(line)["train/reference_point"] for line in lines]
        losses[name] = [json.loads(line)["train/loss"] for line in lines]
    assert max(points["whole"]) > 0.1, points
    for name in ("half", "quarter"):
        assert points[name] == pytest.approx(points["whole"], rel=1e-2, abs=1e-4)
        assert losses[name] == pytest.approx(losses["whole"], rel=1e-3)  # of all processes, not of the first
        difference = (weights[name] - weights["whole"]).norm() / weights["whole"].norm()  # B began at 0
        assert float(difference) < 1e-3
