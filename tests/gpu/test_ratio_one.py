"""Before any update the importance ratio is 1, in the precision, guidance and compile mode of the run."""

from __future__ import annotations

import pytest
import torch

from diffalign.config import DDPOConfig, SamplerConfig
from diffalign.trajectory import Trajectory, rollout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(600),
]

STEPS = 6
PROMPTS = [f"prompt {i}" for i in range(6)]
TOLERANCE = DDPOConfig().clip_range / 10
"""What `train` allows: a tenth of the default clip range, 1e-5. Log-probabilities are means over elements."""


def collect(denoiser, guidance: float, storage: torch.dtype = torch.float32) -> Trajectory:
    sampler = denoiser.make_sampler(SamplerConfig(steps=STEPS, guidance_scale=guidance))
    conditioning = denoiser.encode_prompts(PROMPTS)
    steps = rollout(denoiser, conditioning, sampler, range(len(PROMPTS)), storage_dtype=storage)
    return Trajectory.collect(sampler, steps)


def worst_ratio(denoiser, trajectory: Trajectory, batch: int) -> float:
    """max |ratio - 1| over all steps, replayed with gradients in batches of `batch`, as training does."""
    conditioning = denoiser.encode_prompts(PROMPTS)
    worst = 0.0
    for step in range(STEPS):
        for rows in torch.arange(len(PROMPTS)).split(batch):
            steps = torch.full_like(rows, step)
            gaussian = trajectory.replay(denoiser, conditioning[rows], rows, steps)
            assert gaussian.mean.requires_grad
            log_ratio = trajectory.log_ratio(gaussian, rows, steps).detach()
            worst = max(worst, float((log_ratio.exp() - 1).abs().max()))
    return worst


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("mode", ["eager", "checkpointing"])
def test_the_ratio_before_any_update_is_one(make_cuda_denoiser, precision, full, guidance, mode):
    denoiser = make_cuda_denoiser(precision, full=full, mode=mode)
    trajectory = collect(denoiser, guidance)
    assert worst_ratio(denoiser, trajectory, len(PROMPTS)) <= TOLERANCE


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("mode", ["compile", "compile+checkpointing"])
@pytest.mark.filterwarnings("default")  # the compiler's own, about its internals
def test_the_ratio_is_one_when_sampling_and_training_are_compiled(make_cuda_denoiser, precision, full, mode):
    """Sampling (no gradients) and replay (gradients) are different graphs: fusing them must not change a bit."""
    denoiser = make_cuda_denoiser(precision, full=full, mode=mode)
    trajectory = collect(denoiser, guidance=5.0)
    assert worst_ratio(denoiser, trajectory, len(PROMPTS)) <= TOLERANCE


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("batch", [1, 4])
def test_in_float32_the_ratio_is_one_in_other_batch_sizes(make_cuda_denoiser, full, batch):
    """In half precision cuBLAS may choose another kernel for another batch size, so no test can promise it there
    for every card; `train` measures it in the batches of the run.
    """
    denoiser = make_cuda_denoiser("no", full=full)
    trajectory = collect(denoiser, guidance=5.0)
    assert worst_ratio(denoiser, trajectory, batch) <= TOLERANCE


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounding_before_scoring_keeps_the_ratio_at_one(make_cuda_denoiser, precision, storage):
    denoiser = make_cuda_denoiser(precision)
    trajectory = collect(denoiser, guidance=5.0, storage=storage)
    assert trajectory.latents.dtype == storage
    assert worst_ratio(denoiser, trajectory, len(PROMPTS)) <= TOLERANCE


def test_one_seed_gives_the_same_picture_on_the_gpu_as_on_the_cpu(make_cuda_denoiser, make_denoiser):
    """Noise is drawn on the CPU, so that only rounding differs between devices (6 steps, TF32 off)."""
    on_gpu = collect(make_cuda_denoiser("no"), guidance=5.0)
    on_cpu = collect(make_denoiser(), guidance=5.0)
    torch.testing.assert_close(on_gpu.final.cpu(), on_cpu.final, atol=1e-3, rtol=1e-3)
