"""The estimate against what PyTorch's allocator gives out in a real step, as its profiler records it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import SIDE, write_data

from diffalign.algorithms.base import Context
from diffalign.algorithms.table import build_algorithm
from diffalign.config import RUNS, Run
from diffalign.estimate.methods import work_of
from diffalign.estimate.phases import Phases
from diffalign.estimate.subject import subject
from diffalign.models.loading import load_denoiser


def allocated(work: Callable[[], object]) -> int:
    """Most bytes at once that `work` allocates on the CPU."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def dpo(checkpoint: Path, folder: Path, *, full: bool, checkpointing: bool, batch: int = 8) -> Run:
    return RUNS["dpo"](
        algorithm={"name": "dpo", "batch_size": batch, "validation_every": 0},
        data={"path": str(folder / "pairs.jsonl"), "validation_fraction": 0.0},
        model={"path": str(checkpoint), "resolution": 4 * SIDE, "lora": None if full else {"rank": 4}},
        training={"gradient_checkpointing": checkpointing, "device": "cpu"},
    )


def real_peak(config: Run) -> int:
    """Of the second batch, so that nothing is made for the first time."""
    denoiser = load_denoiser(config.model, trainable=True)
    algorithm = build_algorithm(config, denoiser, None, Context(say=lambda line: None))
    denoiser.keep_reference()
    checkpointing = config.training.gradient_checkpointing
    denoiser.prepare_training(gradient_checkpointing=checkpointing, compile=False)
    batches = [next(algorithm.updates(iteration))[0] for iteration in range(2)]
    algorithm.loss(batches[0]).loss.backward()
    for parameter in denoiser.trainable_parameters().values():
        parameter.grad = None
    return allocated(lambda: algorithm.loss(batches[1]).loss.backward())


@pytest.mark.parametrize(
    ("full", "checkpointing"),
    [(True, False), (False, False), (True, True)],
    ids=["full", "lora", "recomputed"],
)
def test_a_training_step_allocates_what_was_estimated(tiny_pipeline_dir, tmp_path, full, checkpointing):
    write_data(tmp_path)
    config = dpo(tiny_pipeline_dir, tmp_path, full=full, checkpointing=checkpointing)
    denoiser = subject(config, "cpu")
    denoiser.keep_reference()
    estimated = Phases(denoiser, work_of(config, denoiser), config).training.peak
    assert estimated == pytest.approx(real_peak(config), rel=0.2)


def test_sampling_and_decoding_allocate_what_was_estimated(tiny_pipeline_dir, tmp_path):
    write_data(tmp_path)
    config = dpo(tiny_pipeline_dir, tmp_path, full=True, checkpointing=False)
    shapes = subject(config, "cpu")
    phases = Phases(shapes, work_of(config, shapes), config)
    denoiser = load_denoiser(config.model)
    x, t = torch.zeros(8, *denoiser.latent_shape), torch.zeros(8, dtype=torch.int64)
    prompts = denoiser.encode_prompts(["a red star"] * 8)
    with torch.no_grad():
        denoiser.predict(x, t, prompts, 5.0)
        predicted = allocated(lambda: denoiser.predict(x, t, prompts, 5.0))
        decoded = allocated(lambda: denoiser.decode(x))
    assert phases.forward(8, 5.0).peak == pytest.approx(predicted, rel=0.2)
    assert phases.decode(8).peak == pytest.approx(decoded, rel=0.2)
