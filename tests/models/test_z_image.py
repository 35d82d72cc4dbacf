"""Z-Image against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
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
from newer_families import tiny_z_image

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import ConfigError
from diffalign.models.loading import load_denoiser
from diffalign.models.z_image import ZImage

EXACT = SamplerConfig(kind="euler", steps=4, guidance_scale=3.0)
ONLINE = SamplerConfig(kind="flow_sde", steps=3, guidance_scale=3.0)
# Its pipeline's guidance adds: cond + 2 (cond - uncond) is uncond + 3 (cond - uncond).
PLAIN = Plain(ZImagePipeline, EXACT, {"guidance_scale": 2.0})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z_image") / "tiny"
    tiny_z_image().save_pretrained(path)
    return path


def test_euler_draws_what_the_pipeline_draws(folder):
    denoiser = load(folder)
    assert isinstance(denoiser, ZImage)
    check_drawing(denoiser, PLAIN, folder)


def test_without_guidance_it_draws_what_the_pipeline_draws_with_zero(folder):
    denoiser, pipeline = load(folder), ZImagePipeline.from_pretrained(folder)
    turbo = EXACT.model_copy(update={"guidance_scale": 1.0})
    expected = plain(pipeline, denoiser, turbo, "latent", guidance_scale=0.0)
    assert relative_error(sampled(denoiser, turbo), expected) < 1e-4


def test_a_dynamic_shift_is_that_of_the_pipeline(tmp_path):
    tiny_z_image(use_dynamic_shifting=True).save_pretrained(tmp_path)
    check_drawing(load(tmp_path), PLAIN, tmp_path)


def test_a_prompt_is_a_chat_without_its_padding(folder):
    denoiser = load(folder)
    encoded = denoiser.encode_prompts(["red"])
    # one token a byte: <user>red, a new line, <assistant><think>
    assert encoded.extra["mask"].sum() == len("<user>red\n<assistant><think>")
    assert encoded.unconditional_extra["mask"].sum() == len("<user>\n<assistant><think>")
    x, t = torch.randn(1, 16, 8, 8), torch.tensor([500])
    with torch.no_grad():
        before = denoiser.predict(x, t, encoded)
        encoded.embeddings[~encoded.extra["mask"]] += 1
        assert torch.equal(denoiser.predict(x, t, encoded), before)


def test_a_picture_does_not_depend_on_its_batch(folder):
    check_batches(load(folder), ONLINE)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, full=full), tmp_path, ONLINE, EXACT)


def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_lora(load(folder), PLAIN, folder, tmp_path)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_full(load(folder, full=True), PLAIN, tmp_path)


def test_bf16_samples_finite_latents(folder):
    denoiser = load_denoiser(
        ModelConfig(path=str(folder), resolution=16), mixed_precision="bf16", trainable=True
    )
    assert torch.isfinite(sampled(denoiser, EXACT)).all()


def test_the_checkpoint_itself_is_for_1024_pixels():
    denoiser = ZImage(tiny_z_image(), ModelConfig(), device=torch.device("cpu"))
    assert denoiser.latent_shape == (16, 128, 128)


def test_a_language_model_is_not_trained(folder):
    with pytest.raises(ConfigError, match="language model"):
        load(folder, train_text_encoder=True)
