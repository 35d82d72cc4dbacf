"""Z-Image against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from families import PROMPTS, check_training, load, perturb, plain, relative_error, sampled
from newer_families import tiny_z_image
from torch.testing import assert_close

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import ConfigError
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.models.z_image import ZImage

EXACT = SamplerConfig(kind="euler", steps=4, guidance_scale=3.0)
ONLINE = SamplerConfig(kind="flow_sde", steps=3, guidance_scale=3.0)
SAME_GUIDANCE = {"guidance_scale": 2.0}  # cond + 2 (cond - uncond) is uncond + 3 (cond - uncond)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("z_image") / "tiny"
    tiny_z_image().save_pretrained(path)
    return path


def test_euler_draws_what_the_pipeline_draws(folder):
    denoiser, pipeline = load(folder), ZImagePipeline.from_pretrained(folder)
    assert isinstance(denoiser, ZImage)
    latents = sampled(denoiser, EXACT)
    assert relative_error(latents, plain(pipeline, denoiser, EXACT, "latent", **SAME_GUIDANCE)) < 1e-4
    with torch.no_grad():
        expected = plain(pipeline, denoiser, EXACT, "pt", **SAME_GUIDANCE)
        assert_close(denoiser.decode(latents), expected, atol=1 / 255, rtol=0)


def test_without_guidance_it_draws_what_the_pipeline_draws_with_zero(folder):
    denoiser, pipeline = load(folder), ZImagePipeline.from_pretrained(folder)
    turbo = EXACT.model_copy(update={"guidance_scale": 1.0})
    expected = plain(pipeline, denoiser, turbo, "latent", guidance_scale=0.0)
    assert relative_error(sampled(denoiser, turbo), expected) < 1e-4


def test_a_dynamic_shift_is_that_of_the_pipeline(tmp_path):
    tiny_z_image(use_dynamic_shifting=True).save_pretrained(tmp_path)
    denoiser, pipeline = load(tmp_path), ZImagePipeline.from_pretrained(tmp_path)
    expected = plain(pipeline, denoiser, EXACT, "latent", **SAME_GUIDANCE)
    assert relative_error(sampled(denoiser, EXACT), expected) < 1e-4


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
    denoiser = load(folder)
    alone = sampled(denoiser, ONLINE, PROMPTS[:1], [7])
    together = sampled(denoiser, ONLINE, ["a blue ring " * 9, *PROMPTS], [3, 7, 8])
    assert_close(together[1], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, full=full), tmp_path, ONLINE, EXACT)


def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    denoiser = load(folder)
    before = sampled(denoiser, EXACT)
    perturb(denoiser)
    ours = sampled(denoiser, EXACT)
    assert relative_error(ours, before) > 1e-2
    denoiser.export(tmp_path)
    pipeline = ZImagePipeline.from_pretrained(folder)
    pipeline.load_lora_weights(tmp_path)
    assert relative_error(plain(pipeline, denoiser, EXACT, "latent", **SAME_GUIDANCE), ours) < 1e-4


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    denoiser = load(folder, full=True)
    perturb(denoiser)
    ours = sampled(denoiser, EXACT)
    denoiser.export(tmp_path / "final")
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "final")
    assert relative_error(plain(pipeline, denoiser, EXACT, "latent", **SAME_GUIDANCE), ours) < 1e-4
    again = load_for_inference(str(tmp_path / "final"), device="cpu", resolution=16)
    assert relative_error(sampled(again, EXACT), ours) < 1e-4


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
