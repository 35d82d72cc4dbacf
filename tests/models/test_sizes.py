"""Pictures that are not square, on every kind of model, against diffusers' own pipelines; what SDXL is told of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from families import PROMPTS, SEEDS, plain, relative_error, sampled, tiny_flux, tiny_sd3, tiny_sdxl
from torch.testing import assert_close

from diffalign.cli.sampling_args import picture_size
from diffalign.config import ModelConfig, SamplerConfig
from diffalign.config.sizes import as_resolution, as_size
from diffalign.errors import ConfigError
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.models.families import family_of
from diffalign.models.flux import pack, unpack
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.sampling import generate
from diffalign.seeding import sample_noise
from diffalign.trajectory import rollout

TALL = (24, 16)
DIFFUSION = SamplerConfig(steps=3, eta=0.0, guidance_scale=3.0)
FLOW = SamplerConfig(kind="euler", steps=3, guidance_scale=3.0)
MAKE: dict[str, Callable[[], Any]] = {
    "sd": tiny_pipeline,
    "sdxl": tiny_sdxl,
    "sd3": tiny_sd3,
    "flux": tiny_flux,
}


def policy(name: str, resolution: Any = TALL) -> DiffusersDenoiser:
    """A frozen policy that shares its networks with `policy.pipeline`."""
    pipeline = MAKE[name]()
    pipeline.set_progress_bar_config(disable=True)
    config = ModelConfig(lora=None, resolution=resolution)
    return family_of(type(pipeline).__name__)(pipeline, config, device=torch.device("cpu"))


@pytest.mark.parametrize("name", MAKE)
def test_a_tall_picture_is_what_the_pipeline_draws(name):
    denoiser, sampler = policy(name), FLOW if name in ("sd3", "flux") else DIFFUSION
    assert denoiser.size == TALL
    assert denoiser.latent_shape[1:] == (12, 8)
    ours = sampled(denoiser, sampler)
    assert ours.shape[2:] == (12, 8)
    noise = sample_noise(denoiser.latent_shape, SEEDS, "initial")
    at = {"height": 24, "width": 16}
    if name == "flux":
        found = plain(denoiser.pipeline, denoiser, sampler, "latent", latents=pack(noise), **at)
        expected = unpack(found, 12, 8)
    else:
        expected = plain(denoiser.pipeline, denoiser, sampler, "latent", latents=noise, **at)
    assert relative_error(ours, expected) < 1e-4
    with torch.no_grad():
        assert denoiser.decode(ours).shape == (2, 3, *TALL)
        assert denoiser.encode_images(torch.rand(1, 3, *TALL)).shape == (1, *denoiser.latent_shape)


@torch.no_grad()
def test_sdxl_is_told_of_a_crop_what_the_pipeline_tells_it():
    denoiser = policy("sdxl")
    sizes = torch.tensor([[60.0, 40.0, 6.0, 0.0, 24.0, 16.0]] * 2)
    conditioning = denoiser.with_sizes(denoiser.encode_prompts(PROMPTS), sizes)
    *_, last = rollout(denoiser, conditioning, denoiser.make_sampler(DIFFUSION), SEEDS)
    noise = sample_noise(denoiser.latent_shape, SEEDS, "initial")
    at = {"height": 24, "width": 16, "original_size": (60, 40), "crops_coords_top_left": (6, 0)}
    expected = plain(denoiser.pipeline, denoiser, DIFFUSION, "latent", latents=noise, target_size=TALL, **at)
    assert relative_error(last.x_prev, expected) < 1e-4
    assert (
        relative_error(sampled(denoiser, DIFFUSION), expected) > 1e-3
    )  # without a word: nothing was cropped


@torch.no_grad()
def test_the_sizes_of_each_picture_stay_with_it():
    denoiser = policy("sdxl")
    sizes = torch.tensor([[60.0, 40.0, 6.0, 0.0, 24.0, 16.0], [24.0, 16.0, 0.0, 0.0, 24.0, 16.0]])
    conditioning = denoiser.with_sizes(denoiser.encode_prompts(PROMPTS), sizes)
    x, t = sample_noise(denoiser.latent_shape, SEEDS, "x"), torch.tensor([500, 500])
    both = denoiser.predict(x, t, conditioning, 2.0)
    second = denoiser.predict(x[1:], t[1:], conditioning[1:], 2.0)
    assert_close(both[1:], second, atol=1e-5, rtol=1e-5)
    untold = denoiser.predict(x, t, denoiser.encode_prompts(PROMPTS), 2.0)
    assert_close(
        both[1], untold[1], atol=1e-5, rtol=1e-5
    )  # whole, and of its own size: what is meant without a word
    assert not torch.allclose(both[0], untold[0], atol=1e-4)


def test_other_families_are_told_nothing():
    denoiser = policy("sd")
    conditioning = denoiser.encode_prompts(PROMPTS)
    assert denoiser.with_sizes(conditioning, torch.ones(2, 6)) is conditioning


def test_a_dynamic_shift_counts_the_tokens_of_both_sides():
    # 24 / 4 by 16 / 4 tokens are 24; the line passes 256 tokens at 0.5, with a slope of 0.65 / 3840
    assert_close(policy("flux").schedule.shift, math.exp(0.5 - (256 - 24) * 0.65 / 3840))


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("sd", (24, 17), r"model.resolution: 24 x 17 is not a multiple of 2"),
        ("flux", (22, 16), r"22 x 16 is not a multiple of 4"),
        ("sd3", (16, 36), r"model.resolution: 36 is more than this checkpoint has positions for"),
    ],
)
def test_a_size_that_the_model_cannot_take_is_refused(name, size, message):
    with pytest.raises(ConfigError, match=message):
        policy(name, size)


@pytest.mark.parametrize("side", [None, (8, 12)])
def test_a_checkpoint_that_does_not_say_the_side_of_its_pictures_needs_a_resolution(side):
    pipeline = tiny_pipeline()
    pipeline.unet.register_to_config(sample_size=side)
    family = family_of(type(pipeline).__name__)
    with pytest.raises(ConfigError, match="does not say the size of its pictures"):
        family(pipeline, ModelConfig(lora=None), device=torch.device("cpu"))
    given = ModelConfig(lora=None, resolution=16)
    assert family(pipeline, given, device=torch.device("cpu")).size == (16, 16)


def test_a_square_is_written_as_ever():
    assert as_resolution((512, 512)) == 512
    assert as_resolution((512, 768)) == [512, 768]
    assert as_size(512) == (512, 512)
    side, pair = policy("sd", 16), policy("sd", (16, 16))
    assert side.fingerprint() == pair.fingerprint() != policy("sd", (16, 24)).fingerprint()


def test_a_size_on_the_command_line_is_a_side_or_height_and_width():
    assert picture_size("512") == 512
    assert picture_size("512x768") == (512, 768)
    assert picture_size("512x512") == 512
    assert picture_size(None) is None
    for wrong in ("0", "512x0", "512x", "big", "1x2x3", "-8"):
        with pytest.raises(ConfigError, match="must be a side in pixels, or HEIGHTxWIDTH"):
            picture_size(wrong)


def test_a_run_in_full_is_sampled_at_its_own_size(tiny_pipeline_dir: Path, tmp_path: Path):
    """A checkpoint has no place for the size of pictures that are not square; the run's config.yaml has."""
    config = ModelConfig(path=str(tiny_pipeline_dir), lora=None, resolution=TALL)
    load_denoiser(config, trainable=True).export(tmp_path / "final")
    (tmp_path / "config.yaml").write_text(
        f"algorithm: {{name: sft}}\nmodel: {{path: {tiny_pipeline_dir}, lora: null, resolution: [24, 16]}}\n"
        "data: {path: unused}\n"
    )
    again = load_for_inference(str(tmp_path), device="cpu")
    assert again.size == TALL
    assert generate(again, PROMPTS[:1], [1], DIFFUSION, 1).shape == (1, 3, *TALL)
    assert load_for_inference(str(tmp_path), device="cpu", resolution=16).size == (16, 16)
