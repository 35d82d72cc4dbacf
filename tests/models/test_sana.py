"""Sana against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, SanaPipeline
from families import (
    Plain,
    check_batches,
    check_drawing,
    check_full,
    check_lora,
    check_training,
    load,
    plain,
    relative_error,
    sampled,
)
from newer_families import tiny_sana
from torch.testing import assert_close

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.loading import load_denoiser
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


PLAIN = Plain(SanaPipeline, EXACT, AS_GIVEN, first_order)


def test_euler_draws_what_the_pipeline_draws(folder):
    denoiser = load(folder, resolution=SIDE)
    assert isinstance(denoiser, Sana)
    check_drawing(denoiser, PLAIN, folder)


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
    check_batches(load(folder, resolution=SIDE), ONLINE)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, resolution=SIDE, full=full), tmp_path, ONLINE, EXACT)


def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_lora(load(folder, resolution=SIDE), PLAIN, folder, tmp_path)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_full(load(folder, resolution=SIDE, full=True), PLAIN, tmp_path)


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
