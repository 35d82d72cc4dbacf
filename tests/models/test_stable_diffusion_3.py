"""Stable Diffusion 3 against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from families import (
    PROMPTS,
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
    tiny_sd3,
    write_data,
)
from PIL import Image
from torch.testing import assert_close

from diffalign.cli import main
from diffalign.config import RUNS, ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.loading import load_denoiser
from diffalign.models.stable_diffusion_3 import StableDiffusion3
from diffalign.sampling import generate
from diffalign.training.run import align

EXACT = SamplerConfig(kind="euler", steps=4, guidance_scale=3.0)
ONLINE = SamplerConfig(kind="flow_sde", steps=3, guidance_scale=3.0)
PLAIN = Plain(StableDiffusion3Pipeline, EXACT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd3") / "tiny"
    tiny_sd3().save_pretrained(path)
    return path


def test_euler_draws_what_the_pipeline_draws(folder):
    denoiser = load(folder)
    assert isinstance(denoiser, StableDiffusion3)
    check_drawing(denoiser, PLAIN, folder)


def test_without_t5_its_tokens_are_zeros_as_in_the_pipeline(tmp_path):
    tiny_sd3(t5=False).save_pretrained(tmp_path)
    denoiser = load(tmp_path)
    pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    embeddings = denoiser.encode_prompts(PROMPTS).embeddings
    assert embeddings.shape == (2, 16 + 256, 32)
    assert not embeddings[:, 16:].any()
    expected = plain(pipeline, denoiser, EXACT, "latent")
    assert relative_error(sampled(denoiser, EXACT), expected) < 1e-4


def test_a_dynamic_shift_is_that_of_the_pipeline(tmp_path):
    tiny_sd3(use_dynamic_shifting=True, max_shift=1.16).save_pretrained(tmp_path)
    denoiser = load(tmp_path)
    # 16 tokens; the line through (256, 0.5) and (4096, 1.16) is 0.5 - 240 * 0.66 / 3840 = 0.45875 there
    assert_close(denoiser.schedule.shift, math.exp(0.45875))
    check_drawing(denoiser, PLAIN, tmp_path)


def test_a_picture_does_not_depend_on_its_batch(folder):
    check_batches(load(folder), ONLINE)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, full=full), tmp_path, ONLINE, EXACT)


def test_the_adapter_reaches_both_sides_of_the_joint_attention(folder):
    names = list(load(folder).trainable_parameters())
    for target in ("attn.to_q", "attn2.to_k", "attn.add_v_proj", "attn.to_add_out"):
        assert any(f".{target}." in name for name in names), target


@pytest.mark.parametrize("text_encoders", [False, True])
def test_exported_lora_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path, text_encoders):
    check_lora(load(folder, train_text_encoder=text_encoders), PLAIN, folder, tmp_path)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_full(load(folder, full=True), PLAIN, tmp_path)


def test_training_timesteps_reach_the_network_as_times(folder):
    # index 499: u = 1/2, s = 3/2 / (1 + 2/2) = 3/4 with shift 3, so the network's time is 750
    denoiser = load(folder)
    x, conditioning = torch.randn(1, 16, 8, 8), denoiser.encode_prompts(["a"])
    with torch.no_grad():
        by_index = denoiser.predict(x, torch.tensor([499]), conditioning)
        by_time = denoiser.predict(x, torch.tensor([750.0]), conditioning)
    assert torch.equal(by_index, by_time)


def test_latents_round_trip_through_shift_and_scale(folder):
    denoiser = load(folder)
    pixels = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        mean = denoiser.vae.encode(2 * pixels - 1).latent_dist.mean
        assert_close(denoiser.encode_images(pixels), (mean - 0.0609) * 1.5305)
        decoded = denoiser.vae.decode(mean).sample / 2 + 0.5
        assert_close(denoiser.decode(denoiser.encode_images(pixels)), decoded.clamp(0, 1))


def test_float16_keeps_t5_in_bfloat16(folder):
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder)
    config = ModelConfig(path=str(folder))
    denoiser = StableDiffusion3(pipeline, config, device=torch.device("cpu"), compute_dtype=torch.float16)
    assert denoiser.encoders["text_encoder_3"].dtype == torch.bfloat16
    assert denoiser.encoders["text_encoder"].dtype == torch.float16


def test_bf16_samples_finite_latents(folder):
    denoiser = load_denoiser(ModelConfig(path=str(folder)), mixed_precision="bf16", trainable=True)
    assert torch.isfinite(sampled(denoiser, EXACT)).all()


def test_a_diffusion_sampler_is_refused_and_flow_samplers_named(folder):
    with pytest.raises(ConfigError, match="ddim is for variance-preserving") as caught:
        load(folder).make_sampler(SamplerConfig())
    assert "flow_sde" in caught.value.hint


def test_a_command_samples_a_flow_with_euler_unless_told_otherwise(folder, tmp_path, capsys):
    words = ["sample", "--model", str(folder), "--prompts", PROMPTS[0], "--output-dir", str(tmp_path / "out")]
    words += ["--steps", "3", "--guidance-scale", "3", "--resolution", "16", "--device", "cpu", "--seed", "1"]
    assert main([*words, "--sampler-kind", "ddim"]) == 2
    assert "--sampler-kind" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(words) == 0
    drawn = torch.from_numpy(np.asarray(Image.open(tmp_path / "out" / "00000-s1.png")).copy())
    sampler = SamplerConfig(kind="euler", steps=3, guidance_scale=3.0)
    expected = generate(load(folder), PROMPTS[:1], [1], sampler, 1)[0].permute(1, 2, 0)
    assert_close(drawn.float() / 255, expected, atol=1 / 255, rtol=0)


def test_a_run_with_an_evaluation_that_cannot_be_sampled_writes_no_folder(folder, tmp_path):
    write_data(tmp_path)
    run = RUNS["sft"](
        algorithm={"name": "sft", "batch_size": 2},
        model={"path": str(folder), "resolution": 16},
        data={"path": str(tmp_path / "pictures")},
        evaluation={"sets": {"all": str(tmp_path / "prompts.txt")}, "prompts_per_set": 2},
        rewards=[{"name": f"{tmp_path / 'mine.py'}:red"}],
        training={"iterations": 1, "device": "cpu"},
    )
    with pytest.raises(ConfigError, match="ddim is for variance-preserving"):
        align(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [{"prediction_type": "epsilon"}, {"zero_terminal_snr": True}])
def test_options_of_diffusion_are_refused(folder, option):
    with pytest.raises(ConfigError, match="rectified flow"):
        load(folder, **option)


@pytest.mark.parametrize(("resolution", "why"), [(18, "not a multiple of 4"), (64, "positions for")])
def test_a_resolution_that_the_transformer_cannot_take_is_refused(folder, resolution, why):
    with pytest.raises(ConfigError, match=why):
        load(folder, resolution=resolution)


def test_a_scheduler_that_is_not_of_a_flow_is_refused(tmp_path):
    tiny_sd3().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    index = json.loads(file.read_text())
    file.write_text(json.dumps({**index, "scheduler": ["diffusers", "DDIMScheduler"]}))
    with pytest.raises(CheckpointError, match="DDIMScheduler"):
        load(tmp_path)
