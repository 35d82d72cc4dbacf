"""The work of each method as it is estimated, against the rows that its network really sees in an iteration."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_data

from diffalign.algorithms.base import Context
from diffalign.algorithms.table import build_algorithm
from diffalign.config import RUNS, RewardConfig, Run, TrainingConfig
from diffalign.estimate.methods import _METHODS, work_of
from diffalign.estimate.work import Work
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.rewards import RewardMixture
from diffalign.training.loop import Trainer
from diffalign.training.processes import Processes

NOISY = {"kind": "ddim", "steps": 3, "eta": 1.0, "guidance_scale": 2.0}
EXACT = {"kind": "ddim", "steps": 3, "eta": 0.0, "guidance_scale": 1.0}
DRAWN = {"prompts_per_iteration": 2, "group_size": 2, "sample_batch_size": 2}
COMPARED = {**DRAWN, "updates_per_epoch": 2, "train_batch_size": 2}
TRAJECTORIES = {**DRAWN, "updates_per_epoch": 1, "train_batch_size": 4, "ratio_check": "warn"}
POINTS = {**DRAWN, "noise_levels": 2, "train_batch_size": 4, "kl_weight": 0.1}
GIVEN = {"batch_size": 2, "gradient_accumulation": 2}
GRADIENTS = {"prompts_per_iteration": 2, "train_batch_size": 2}
CASES: dict[str, tuple[dict[str, Any], str, dict[str, Any] | None]] = {
    "sft": (GIVEN, "pictures", None),
    "dpo": ({**GIVEN, "batch_size": 1, "validation_every": 0}, "pairs.jsonl", None),
    "kto": (GIVEN, "labelled", None),
    "spin": ({**GIVEN, "batch_size": 1, "iterations_per_generation": 1}, "pictures", EXACT),
    "raft": ({**DRAWN, "batch_size": 2, "updates_per_iteration": 2}, "prompts.txt", EXACT),
    "rwr": ({**DRAWN, "batch_size": 2, "updates_per_iteration": 2}, "prompts.txt", EXACT),
    "ddpo": (TRAJECTORIES, "prompts.txt", NOISY),
    "grpo": ({**TRAJECTORIES, "inner_epochs": 2, "kl_weight": 0.1, "timestep_fraction": 0.5}, "prompts.txt", NOISY),
    "dpok": ({**TRAJECTORIES, "updates_per_epoch": 2}, "prompts.txt", NOISY),
    "nft": ({**POINTS, "updates_per_iteration": 2}, "prompts.txt", NOISY),
    "awm": ({**POINTS, "updates_per_iteration": 2}, "prompts.txt", EXACT),
    "refl": ({**GRADIENTS, "stop_range": [1, 1]}, "prompts.txt", EXACT),
    "draft": ({**GRADIENTS, "backprop_steps": 2}, "prompts.txt", EXACT),
    "alignprop": ({**GRADIENTS, "backprop_range": [2, 2], "checkpoint_steps": False}, "prompts.txt", EXACT),
    "d3po": ({**COMPARED, "inner_epochs": 2}, "prompts.txt", NOISY),
    "prdp": ({**COMPARED, "clip_range": 1.0}, "prompts.txt", NOISY),
    "spo": ({**COMPARED, "first_step": 1}, "prompts.txt", NOISY),
    "online_dpo": ({**COMPARED, "timesteps_per_pair": 2, "label_temperature": 1.0, "loss": "cdpo"},
                   "prompts.txt", EXACT),
}  # fmt: skip
"""Name -> its options, its data, how it samples."""
ALWAYS = ("dpo", "ddpo", "draft", "spo")
"""One of each kind; the others take a second or two each."""


def run_of(name: str, folder: Path) -> Run:
    options, data, sampler = CASES[name]
    write_data(folder)
    pairs = {"path": str(folder / "pairs.jsonl"), "validation_fraction": 0.0}
    sections: dict[str, Any] = {
        "data": {"pairs.jsonl": pairs, "labelled": {**pairs, "from_pairs": True}}.get(
            data, {"path": str(folder / data)}
        ),
        "training": TrainingConfig(iterations=2, device="cpu", learning_rate=1e-6),
    }
    if sampler is not None:
        sections["sampler"] = sampler
    if data == "prompts.txt":
        sections["rewards"] = [RewardConfig(name=f"{folder / 'mine.py'}:red", label="red")]
    return RUNS[name](algorithm={"name": name, **options}, **sections)


def rows_seen(config: Run, denoiser: DiffusersDenoiser) -> Counter[bool]:
    """Rows of the network in the second iteration: with gradient (True), without (False)."""
    seen: Counter[bool] = Counter()

    def note(module: Any, inputs: tuple[Any, ...]) -> None:
        seen[torch.is_grad_enabled()] += len(inputs[0])

    hook = denoiser.network.register_forward_pre_hook(note)
    context = Context(say=lambda line: None)
    reward = RewardMixture(config.rewards) if config.rewards else None
    algorithm = build_algorithm(config, denoiser, reward, context)
    trainer = Trainer(
        algorithm, denoiser.trainable_parameters(), config.training, Processes("cpu"), context.meter
    )
    trainer.run(lambda iteration, metrics: seen.clear() if iteration == 1 else None)
    hook.remove()
    return seen


def rows_estimated(work: Work) -> Counter[bool]:
    twice = 1 if work.guidance == 1 else 2
    learned = work.rows * work.batches
    with_gradient = learned * work.mean_depth * (2 if work.checkpointed_steps else 1)
    without = learned * (work.frozen_before + work.frozen_after) + work.other_rows
    drawn = 0.0
    if work.sampling is not None:
        drawn = work.sampling.calls * (1 if work.sampling.guidance == 1 else 2)
    return Counter({True: round(with_gradient * twice), False: round(without * twice + drawn)})


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in CASES]
)
def test_the_network_sees_as_many_rows_as_were_estimated(make_denoiser, tmp_path, name):
    config, denoiser = run_of(name, tmp_path), make_denoiser()
    estimated = rows_estimated(work_of(config, denoiser))
    assert +rows_seen(config, denoiser) == +estimated


def test_every_method_is_estimated():
    assert set(_METHODS) == set(RUNS)
    assert set(CASES) == set(RUNS) - {"rankdpo"}  # whose lists are in its data
