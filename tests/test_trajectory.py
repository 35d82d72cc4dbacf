"""Rollout and replay of a real (tiny) pipeline: ratio one, batch independence, diffusers' own call as the oracle."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.testing import assert_close

from diffalign.config import SamplerConfig
from diffalign.sampling import generate
from diffalign.seeding import sample_noise
from diffalign.trajectory import Trajectory, rollout

STEPS = 6
PROMPTS = [f"prompt {i}" for i in range(6)]
CLIP_RANGE = 1e-4


def collect(denoiser, config: SamplerConfig, storage: torch.dtype = torch.float32) -> Trajectory:
    sampler = denoiser.make_sampler(config)
    conditioning = denoiser.encode_prompts(PROMPTS)
    steps = rollout(denoiser, conditioning, sampler, range(len(PROMPTS)), storage_dtype=storage)
    return Trajectory.collect(sampler, steps)


def ratio_errors(denoiser, trajectory: Trajectory, batch: int) -> list[float]:
    """max |ratio - 1| at each timestep, replayed in batches of `batch`."""
    conditioning = denoiser.encode_prompts(PROMPTS)
    errors = []
    for step in range(STEPS):
        for rows in torch.arange(len(PROMPTS)).split(batch):
            steps = torch.full_like(rows, step)
            gaussian = trajectory.replay(denoiser, conditioning[rows], rows, steps)
            ratio = trajectory.log_ratio(gaussian, rows, steps).detach().exp()
            errors.append(float((ratio - 1).abs().max()))
    return errors


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_ratio_before_any_update_is_one(make_denoiser, precision, full, guidance, checkpointing):
    denoiser = make_denoiser(full=full, mixed_precision=precision)
    denoiser.prepare_training(gradient_checkpointing=checkpointing, compile=False)
    trajectory = collect(denoiser, SamplerConfig(steps=STEPS, guidance_scale=guidance))
    assert max(ratio_errors(denoiser, trajectory, len(PROMPTS))) < 1e-5
    for batch in (1, 4):
        assert max(ratio_errors(denoiser, trajectory, batch)) < CLIP_RANGE / 10


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16])
def test_rounding_before_scoring_keeps_the_ratio_at_one(make_denoiser, storage, kind):
    denoiser = make_denoiser()
    sampler = denoiser.make_sampler(SamplerConfig(kind=kind, steps=STEPS))
    conditioning = denoiser.encode_prompts(PROMPTS)
    steps = rollout(denoiser, conditioning, sampler, range(len(PROMPTS)), storage_dtype=storage)
    trajectory = Trajectory.collect(sampler, steps)
    assert trajectory.latents.dtype == storage
    rows = torch.arange(len(PROMPTS))
    for step in sampler.stochastic_steps():
        steps = torch.full_like(rows, step)
        log_ratio = trajectory.log_ratio(trajectory.replay(denoiser, conditioning, rows, steps), rows, steps)
        assert_close(log_ratio.detach(), torch.zeros(len(PROMPTS)), atol=1e-6, rtol=0)


def test_scoring_before_rounding_would_move_the_ratio_by_more_than_the_clip_range(make_denoiser):
    """The rule "round, then score" is not pedantry: this is what the other order costs in bfloat16."""
    denoiser = make_denoiser()
    sampler = denoiser.make_sampler(SamplerConfig(steps=STEPS))
    conditioning = denoiser.encode_prompts(PROMPTS)
    rows = torch.arange(len(PROMPTS))
    worst = 0.0
    for step in rollout(denoiser, conditioning, sampler, range(len(PROMPTS))):
        t = torch.full_like(rows, step.t)
        with torch.no_grad():
            prediction = denoiser.predict(step.x, t, conditioning, sampler.guidance_scale)
        gaussian = sampler.step(step.x, prediction, t, torch.full_like(rows, step.t_prev))
        rounded = gaussian.log_prob(step.x_prev.bfloat16())
        worst = max(worst, float(((rounded - step.log_prob).exp() - 1).abs().max()))
    assert worst > CLIP_RANGE


def test_replay_takes_any_mix_of_samples_and_steps(make_denoiser):
    denoiser = make_denoiser()
    trajectory = collect(denoiser, SamplerConfig(steps=STEPS))
    samples, steps = torch.tensor([3, 0, 5, 0]), torch.tensor([0, 4, 2, 1])
    gaussian = trajectory.replay(denoiser, denoiser.encode_prompts(PROMPTS)[samples], samples, steps)
    log_ratio = trajectory.log_ratio(gaussian, samples, steps)
    assert_close(log_ratio.detach(), torch.zeros(4), atol=1e-5, rtol=0)
    log_ratio.sum().backward()
    assert all(p.grad is not None for p in denoiser.trainable_parameters().values())


def test_a_changed_policy_changes_the_ratio(make_denoiser):
    denoiser = make_denoiser(full=True)
    trajectory = collect(denoiser, SamplerConfig(steps=STEPS))
    with torch.no_grad():
        for parameter in denoiser.trainable_parameters().values():
            parameter.mul_(1.01)
    assert max(ratio_errors(denoiser, trajectory, len(PROMPTS))) > 1e-4


def test_a_picture_depends_on_its_prompt_and_seed_only(make_denoiser):
    denoiser = make_denoiser()
    config = SamplerConfig(steps=STEPS, eta=1.0, guidance_scale=3.0)
    together = generate(denoiser, PROMPTS, list(range(6)), config, batch_size=6)
    apart = generate(denoiser, PROMPTS[::-1], list(range(6))[::-1], config, batch_size=2).flip(0)
    assert_close(together, apart, atol=1e-5, rtol=0)
    other = generate(denoiser, PROMPTS[:1], [99], config, batch_size=1)
    assert float((other - together[:1]).abs().max()) > 1e-3


def test_prompts_and_seeds_are_pairs(make_denoiser):
    with pytest.raises(ValueError, match="pairs"):
        generate(make_denoiser(), PROMPTS, [1], SamplerConfig(steps=2), batch_size=2)


@pytest.mark.parametrize("variant", ["epsilon", "v zero-snr"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_pictures_equal_those_of_the_plain_diffusers_pipeline(
    make_denoiser, tiny_pipeline_dir, tiny_v_pipeline_dir, variant, guidance
):
    folder = tiny_pipeline_dir if variant == "epsilon" else tiny_v_pipeline_dir
    denoiser = make_denoiser(path=folder)
    config = SamplerConfig(steps=STEPS, eta=0.0, guidance_scale=guidance)
    ours = generate(denoiser, PROMPTS[:2], [7, 8], config, batch_size=2)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    theirs = pipeline(
        PROMPTS[:2],
        latents=sample_noise(denoiser.latent_shape, [7, 8], "initial"),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    assert_close(ours, theirs.float(), atol=1 / 255, rtol=0)


def test_the_normalised_ratio_is_one_before_any_update_and_needs_the_means(make_denoiser):
    denoiser = make_denoiser()
    sampler = denoiser.make_sampler(SamplerConfig(steps=STEPS))
    conditioning = denoiser.encode_prompts(PROMPTS)
    seeds, rows = range(len(PROMPTS)), torch.arange(len(PROMPTS))
    kept = Trajectory.collect(sampler, rollout(denoiser, conditioning, sampler, seeds), keep_means=True)
    steps = torch.full_like(rows, 2)
    gaussian = kept.replay(denoiser, conditioning, rows, steps)
    log_ratio = kept.log_ratio(gaussian, rows, steps, normalized=True)
    assert_close(log_ratio.detach(), torch.zeros(len(PROMPTS)), atol=1e-6, rtol=0)
    plain = collect(denoiser, SamplerConfig(steps=STEPS))
    with pytest.raises(ValueError, match="keep_means"):
        plain.log_ratio(gaussian, rows, steps, normalized=True)


def test_means_are_joined_with_their_batches(make_denoiser):
    denoiser = make_denoiser()
    sampler = denoiser.make_sampler(SamplerConfig(steps=2))
    conditioning = denoiser.encode_prompts(PROMPTS)
    parts = [
        Trajectory.collect(
            sampler, rollout(denoiser, conditioning[rows], sampler, rows.tolist()), keep_means=True
        )
        for rows in torch.arange(len(PROMPTS)).split(4)
    ]
    whole = Trajectory.concatenate(parts)
    assert whole.means.shape == (2, len(PROMPTS), *denoiser.latent_shape)
    assert torch.equal(whole.means[:, :4], parts[0].means)
