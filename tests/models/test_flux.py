"""FLUX.1 against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from families import (
    SEEDS,
    Plain,
    check_batches,
    check_drawing,
    check_full,
    check_lora,
    check_training,
    load,
    perturb,
    plain,
    relative_error,
    sampled,
    tiny_flux,
)
from torch.testing import assert_close

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.flux import Flux, pack, positions, unpack
from diffalign.models.loading import load_denoiser
from diffalign.seeding import sample_noise

EXACT = SamplerConfig(kind="euler", steps=4, guidance_scale=3.5)
ONLINE = SamplerConfig(kind="flow_sde", steps=3, guidance_scale=3.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 [dev]."""
    path = tmp_path_factory.mktemp("flux") / "dev"
    tiny_flux().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 [schnell]: no guidance input, no shift."""
    path = tmp_path_factory.mktemp("flux") / "schnell"
    tiny_flux(guidance_embeds=False, use_dynamic_shifting=False, shift=1.0).save_pretrained(path)
    return path


class PlainFlux(Plain):
    def call(self, pipeline, denoiser, output):
        noise = pack(sample_noise(denoiser.latent_shape, SEEDS, "initial"))
        found = plain(pipeline, denoiser, self.sampler, output, latents=noise, **self.options)
        return unpack(found, 8, 8) if output == "latent" else found


PLAIN = PlainFlux(FluxPipeline, EXACT)


def test_euler_draws_what_the_pipeline_draws(folder):
    denoiser = load(folder)
    assert isinstance(denoiser, Flux)
    check_drawing(denoiser, PLAIN, folder)


def test_without_a_guidance_input_guidance_is_true_cfg(schnell):
    guided = {"negative_prompt": ["", ""], "true_cfg_scale": EXACT.guidance_scale}
    check_drawing(load(schnell), PlainFlux(FluxPipeline, EXACT, guided), schnell)


def test_the_shift_grows_with_the_resolution(folder):
    # tokens: (16 / 2 / 2)^2 = 16 and (64 / 2 / 2)^2 = 256, where the line begins with 0.5; slope 0.65 / 3840
    shifts = [load(folder, resolution=side).schedule.shift for side in (16, 64)]
    assert_close(shifts, [math.exp(0.5 - 240 * 0.65 / 3840), math.exp(0.5)])


def test_packing_keeps_a_square_of_four_cells_together():
    latents = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4)
    tokens = pack(latents)
    assert tokens.shape == (1, 4, 8)
    assert tokens[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23]  # top right square, of channel 0, then of 1
    assert torch.equal(unpack(tokens, 4, 4), latents)
    assert positions(2, 2, latents.device).tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]


def test_a_picture_does_not_depend_on_its_batch(folder):
    check_batches(load(folder), ONLINE)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, full=full), tmp_path, ONLINE, EXACT)


@pytest.mark.parametrize("text_encoders", [False, True])
def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path, text_encoders):
    check_lora(load(folder, train_text_encoder=text_encoders), PLAIN, folder, tmp_path)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_full(load(folder, full=True), PLAIN, tmp_path)


def test_bf16_samples_finite_latents(folder):
    denoiser = load_denoiser(
        ModelConfig(path=str(folder), resolution=16), mixed_precision="bf16", trainable=True
    )
    assert torch.isfinite(sampled(denoiser, EXACT)).all()


def test_the_checkpoint_itself_is_for_1024_pixels():
    denoiser = Flux(tiny_flux(), ModelConfig(), device=torch.device("cpu"))
    assert denoiser.latent_shape == (16, 128, 128)


def test_a_network_that_fills_holes_is_refused(tmp_path):
    tiny_flux(channels=384).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="takes 96 channels, and a latent has 16"):
        load(tmp_path)


def test_a_distilled_network_takes_no_negative_model(folder, schnell):
    with pytest.raises(ConfigError, match="takes no negative model"):
        load(folder).guide_away_from(load(folder))
    negative = load(schnell)
    perturb(negative)
    guided = load(schnell)
    before = sampled(guided, EXACT)
    guided.guide_away_from(negative)
    assert relative_error(sampled(guided, EXACT), before) > 1e-2
