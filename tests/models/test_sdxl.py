"""Stable Diffusion XL against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from families import (
    PROMPTS,
    SIDE,
    Plain,
    check_batches,
    check_drawing,
    check_full,
    check_lora,
    check_training,
    load,
    perturb,
    sampled,
    tiny_sdxl,
)

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.loading import load_denoiser
from diffalign.models.sdxl import StableDiffusionXL

EXACT = SamplerConfig(steps=4, eta=0.0, guidance_scale=3.0)
ONLINE = SamplerConfig(steps=3, guidance_scale=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sdxl") / "tiny"
    tiny_sdxl().save_pretrained(path)
    return path


def unmarked(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    """Without the watermark that diffusers adds where it can."""
    pipeline.watermark = None
    return pipeline


def with_ddim(pipeline: StableDiffusionXLPipeline) -> StableDiffusionXLPipeline:
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    return unmarked(pipeline)


PLAIN = Plain(StableDiffusionXLPipeline, EXACT, prepare=unmarked)


@pytest.mark.parametrize("plain", [PLAIN, replace(PLAIN, prepare=with_ddim)], ids=["its own Euler", "DDIM"])
def test_ddim_without_noise_draws_what_the_pipeline_draws(folder, plain):
    denoiser = load(folder)
    assert isinstance(denoiser, StableDiffusionXL)
    check_drawing(denoiser, plain, folder)


def test_a_picture_does_not_depend_on_its_batch(folder):
    check_batches(load(folder), ONLINE)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, full=full), tmp_path, ONLINE, EXACT)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_both_text_encoders_train_and_have_a_reference(folder, full):
    denoiser = load(folder, full=full, train_text_encoder=True)
    trained = {name.split(".")[0] for name in denoiser.trainable_parameters()}
    assert trained == {"unet", "text_encoder", "text_encoder_2"}
    with torch.no_grad():
        start = denoiser.encode_prompts(PROMPTS)
        perturb(denoiser)
        moved = denoiser.encode_prompts(PROMPTS)
        with denoiser.reference():
            reference = denoiser.encode_prompts(PROMPTS)
    assert not torch.allclose(moved.embeddings, start.embeddings, atol=1e-3)
    assert torch.equal(reference.embeddings, start.embeddings)
    assert torch.equal(reference.extra["pooled"], start.extra["pooled"])


@pytest.mark.parametrize("text_encoders", [False, True])
def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path, text_encoders):
    check_lora(load(folder, train_text_encoder=text_encoders), PLAIN, folder, tmp_path)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_full(load(folder, full=True), PLAIN, tmp_path)


def test_an_empty_prompt_is_zeros_where_the_checkpoint_says_so(folder):
    denoiser = load(folder)
    encoded = denoiser.encode_prompts(["", "a red star"])
    for rows in (encoded.embeddings, encoded.extra["pooled"]):
        assert not rows[0].any()
        assert rows[1].any()
    assert not encoded.unconditional.any()
    denoiser.pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    denoiser._prompt_cache.clear()
    assert denoiser.encode_prompts([""]).unconditional.any()


def test_rows_of_a_conditioning_carry_all_of_a_prompt(folder):
    encoded = load(folder).encode_prompts([*PROMPTS, "a blue ring"])
    picked = encoded[torch.tensor([2, 0])]
    assert torch.equal(picked.embeddings, encoded.embeddings[[2, 0]])
    assert torch.equal(picked.extra["pooled"], encoded.extra["pooled"][[2, 0]])
    both = picked.after_unconditional()
    assert torch.equal(both.embeddings[:2], picked.unconditional.expand(2, -1, -1))
    assert torch.equal(both.extra["pooled"][2:], picked.extra["pooled"])


def test_the_network_is_told_the_resolution(folder):
    at_16, at_32 = load(folder), load(folder, resolution=2 * SIDE)
    x, t = torch.zeros(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        outputs = [d.predict(x, t, d.encode_prompts(["a"])) for d in (at_16, at_32)]
    assert not torch.allclose(*outputs, atol=1e-4)


def test_bf16_keeps_frozen_weights_small_and_the_adapter_in_float32(folder):
    config = ModelConfig(path=str(folder), vae_dtype="bfloat16")
    denoiser = load_denoiser(config, mixed_precision="bf16", trainable=True)
    assert {part.dtype for part in denoiser.encoders.values()} == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in denoiser.trainable_parameters().values())
    assert torch.isfinite(sampled(denoiser, EXACT)).all()


def test_a_vae_that_overflows_in_float16_is_refused_there(folder):
    with pytest.raises(ConfigError, match="overflows in float16"):
        load(folder, vae_dtype="float16")


def test_a_refiner_is_refused(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "refiner")
    index = json.loads((copied / "model_index.json").read_text())
    refiner = {**index, "_class_name": "StableDiffusionXLImg2ImgPipeline"}
    (copied / "model_index.json").write_text(json.dumps(refiner))
    with pytest.raises(CheckpointError, match="is not supported") as caught:
        load(copied)
    assert "StableDiffusionXLPipeline" in caught.value.hint


def test_a_pipeline_without_its_first_text_encoder_is_refused():
    pipeline = tiny_sdxl()
    pipeline.text_encoder = None
    with pytest.raises(CheckpointError, match="lacks a text encoder: text_encoder"):
        StableDiffusionXL(pipeline, ModelConfig(), device=torch.device("cpu"))


def test_an_inpainting_network_is_refused(tmp_path):
    tiny_sdxl(in_channels=9).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="takes 9 channels, and a latent has 4"):
        load(tmp_path)
