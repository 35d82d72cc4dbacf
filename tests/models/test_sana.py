"""Sana against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline
from families import PROMPTS, check_training, load, perturb, plain, relative_error, sampled
from newer_families import tiny_sana
from torch.testing import assert_close

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.models.sana import INSTRUCTION, Sana

EXACT = SamplerConfig(kind="euler", steps=4, guidance_scale=3.0)
ONLINE = SamplerConfig(kind="flow_sde", steps=3, guidance_scale=3.0)
SIDE = 32  # the least that the pipeline takes
AS_GIVEN = {"use_resolution_binning": False, "height": SIDE, "width": SIDE}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sana") / "tiny"
    tiny_sana().save_pretrained(path)
    return path


def first_order(pipeline: SanaPipeline) -> SanaPipeline:
    """With DPM-Solver of order 1, which is Euler for a flow."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    return pipeline


def test_euler_draws_what_the_pipeline_draws(folder):
    denoiser, pipeline = load(folder, resolution=SIDE), first_order(SanaPipeline.from_pretrained(folder))
    assert isinstance(denoiser, Sana)
    latents = sampled(denoiser, EXACT)
    assert relative_error(latents, plain(pipeline, denoiser, EXACT, "latent", **AS_GIVEN)) < 1e-4
    with torch.no_grad():
        expected = plain(pipeline, denoiser, EXACT, "pt", **AS_GIVEN)
        assert_close(denoiser.decode(latents), expected, atol=1 / 255, rtol=0)


def test_with_a_flow_matching_scheduler_and_a_time_scale_it_draws_what_the_pipeline_draws(tmp_path):
    pipeline = tiny_sana(timestep_scale=0.5)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipeline.save_pretrained(tmp_path)
    denoiser = load(tmp_path, resolution=SIDE)
    assert denoiser.schedule.shift == 7
    expected = plain(pipeline, denoiser, EXACT, "latent", **AS_GIVEN)
    assert relative_error(sampled(denoiser, EXACT), expected) < 1e-4


def test_the_solvers_levels_are_those_of_its_shift_and_the_network_is_told_whole_times(folder):
    denoiser = load(folder, resolution=SIDE)
    assert denoiser.schedule.shift == 3
    times = denoiser.make_sampler(SamplerConfig(kind="euler", steps=2)).timesteps
    # u = 0.999 and 0.999 / 2; s = 3 u / (1 + 2 u): 2.997 / 2.998 and 1.4985 / 1.999
    assert_close(times, torch.tensor([2997 / 2.998, 1498.5 / 1.999]))
    assert denoiser._times(times).tolist() == [999, 749]


def test_the_instruction_is_read_before_a_prompt_and_not_before_the_empty_one(folder):
    denoiser, pipeline = load(folder, resolution=SIDE), SanaPipeline.from_pretrained(folder)
    assert INSTRUCTION.endswith("User Prompt: ")
    encoded = denoiser.encode_prompts(["A Red star "])
    states, mask, without, mask_without = pipeline.encode_prompt(
        ["A Red star "], complex_human_instruction=INSTRUCTION.split("\n")
    )
    assert_close(encoded.embeddings, states)
    assert_close(encoded.unconditional, without)
    assert torch.equal(encoded.extra["mask"], mask)
    assert torch.equal(encoded.unconditional_extra["mask"], mask_without)
    assert (
        10 < mask.sum() < 30
    )  # the prompt and the end of the instruction; nothing but the start of "" is kept
    assert mask_without.sum() < 3


def test_a_picture_does_not_depend_on_its_batch(folder):
    denoiser = load(folder, resolution=SIDE)
    alone = sampled(denoiser, ONLINE, PROMPTS[:1], [7])
    together = sampled(denoiser, ONLINE, ["a blue ring", *PROMPTS], [3, 7, 8])
    assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, resolution=SIDE, full=full), tmp_path, ONLINE, EXACT)


def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    denoiser = load(folder, resolution=SIDE)
    before = sampled(denoiser, EXACT)
    perturb(denoiser)
    ours = sampled(denoiser, EXACT)
    assert relative_error(ours, before) > 1e-2
    denoiser.export(tmp_path)
    pipeline = first_order(SanaPipeline.from_pretrained(folder))
    pipeline.load_lora_weights(tmp_path)
    assert relative_error(plain(pipeline, denoiser, EXACT, "latent", **AS_GIVEN), ours) < 1e-4


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    denoiser = load(folder, resolution=SIDE, full=True)
    perturb(denoiser)
    ours = sampled(denoiser, EXACT)
    denoiser.export(tmp_path / "final")
    pipeline = first_order(SanaPipeline.from_pretrained(tmp_path / "final"))
    assert relative_error(plain(pipeline, denoiser, EXACT, "latent", **AS_GIVEN), ours) < 1e-4
    again = load_for_inference(str(tmp_path / "final"), device="cpu", resolution=SIDE)
    assert relative_error(sampled(again, EXACT), ours) < 1e-4


def test_latents_of_pictures_are_the_autoencoders_scaled(folder):
    denoiser = load(folder, resolution=SIDE)
    pixels = torch.rand(1, 3, SIDE, SIDE)
    with torch.no_grad():
        latents = denoiser.vae.encode(2 * pixels - 1).latent
        assert_close(denoiser.encode_images(pixels), 0.41407 * latents)
        decoded = denoiser.vae.decode(latents).sample / 2 + 0.5
        assert_close(denoiser.decode(denoiser.encode_images(pixels)), decoded.clamp(0, 1))


def test_bf16_samples_finite_latents(folder):
    denoiser = load_denoiser(
        ModelConfig(path=str(folder), resolution=SIDE), mixed_precision="bf16", trainable=True
    )
    assert torch.isfinite(sampled(denoiser, EXACT)).all()


def test_a_solver_that_is_not_of_a_flow_is_refused(tmp_path):
    tiny_sana(use_flow_sigmas=False, prediction_type="epsilon").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="DPMSolverMultistepScheduler") as caught:
        load(tmp_path, resolution=SIDE)
    assert "use_flow_sigmas" in caught.value.why


def test_a_sampler_of_diffusion_is_refused(folder):
    with pytest.raises(ConfigError, match="ddim is for variance-preserving"):
        load(folder, resolution=SIDE).make_sampler(SamplerConfig())


def test_a_network_that_takes_the_guidance_scale_is_refused(tmp_path):
    tiny_sana(guidance_embeds=True).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="takes the guidance scale as an input") as caught:
        load(tmp_path, resolution=SIDE)
    assert "Sana-Sprint" in caught.value.why
