"""PixArt-Sigma against diffusers' own pipeline, through training, through a LoRA file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
)
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
from newer_families import tiny_pixart
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError, ConfigError
from diffalign.models.loading import load_denoiser
from diffalign.models.pixart_sigma import PixArtSigma
from diffalign.schedule import NoiseSchedule

EXACT = SamplerConfig(steps=4, eta=0.0, guidance_scale=3.0)
ONLINE = SamplerConfig(steps=3, guidance_scale=3.0)
AS_GIVEN = {"use_resolution_binning": False, "clean_caption": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pixart") / "tiny"
    tiny_pixart().save_pretrained(path)
    return path


def first_order(pipeline: PixArtSigmaPipeline) -> PixArtSigmaPipeline:
    """With DPM-Solver of order 1, which is DDIM."""
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, solver_order=1)
    return pipeline


class PlainPixArt(Plain):
    def add_lora(self, pipeline, folder):
        """By peft: the pipeline has no load_lora_weights."""
        assert type(pipeline.transformer) is diffusers.PixArtTransformer2DModel
        with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
            settings = json.loads(file.metadata()["lora_adapter_metadata"])
        weights = load_file(folder / "pytorch_lora_weights.safetensors")
        own = {name.removeprefix("transformer."): value for name, value in settings.items()}
        inject_adapter_in_model(LoraConfig(**own), pipeline.transformer)
        set_peft_model_state_dict(
            pipeline.transformer,
            {name.removeprefix("transformer."): value for name, value in weights.items()},
        )


PLAIN = PlainPixArt(PixArtSigmaPipeline, EXACT, AS_GIVEN, first_order)


def test_ddim_without_noise_draws_what_the_pipeline_draws(folder):
    denoiser = load(folder)
    assert isinstance(denoiser, PixArtSigma)
    assert isinstance(denoiser.schedule, NoiseSchedule)
    check_drawing(denoiser, PLAIN, folder)


def test_every_step_ends_where_the_next_begins(folder):
    # 1000 timesteps, 4 steps: 999 in quarters, rounded, without 0
    sampler = load(folder).make_sampler(EXACT)
    assert sampler.timesteps.tolist() == [999, 749, 500, 250]
    assert sampler.previous.tolist() == [749, 500, 250, -1]


def test_a_network_that_takes_sizes_is_told_them_as_by_pixart_alpha(tmp_path):
    tiny_pixart(sample_size=128, sizes=True).save_pretrained(
        tmp_path
    )  # PixArt-alpha's tells its network at 128 only
    denoiser = load(tmp_path)
    alpha = first_order(PixArtAlphaPipeline(**PixArtSigmaPipeline.from_pretrained(tmp_path).components))
    expected = plain(alpha, denoiser, EXACT, "latent", max_sequence_length=300, **AS_GIVEN)
    assert relative_error(sampled(denoiser, EXACT), expected) < 1e-4
    x, t, prompt = torch.randn(1, 4, 8, 12), torch.tensor([500]), denoiser.encode_prompts(["a"])
    sizes = denoiser._sizes(x)
    assert sizes["resolution"].tolist() == [[16, 24]]
    assert_close(sizes["aspect_ratio"], torch.tensor([[16 / 24]]))
    assert denoiser.predict(x, t, prompt).shape == x.shape


def test_the_padding_of_a_prompt_is_masked(folder):
    denoiser = load(folder)
    prompt = denoiser.encode_prompts(["A Red\tstar "])
    # the end token, and the letters of "a red star" with a space before each word
    assert prompt.extra["mask"].sum() == 11 + 1
    assert torch.equal(prompt.embeddings, denoiser.encode_prompts(["a red star"]).embeddings)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    with torch.no_grad():
        before = denoiser.predict(x, t, prompt)
        prompt.embeddings[:, 12:] += 1
        assert_close(denoiser.predict(x, t, prompt), before)


def test_a_picture_does_not_depend_on_its_batch(folder):
    check_batches(load(folder), ONLINE)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_it_trains(folder, tmp_path, full):
    check_training(load(folder, full=full), tmp_path, ONLINE, EXACT)


def test_exported_lora_is_a_peft_adapter_of_diffusers_own_transformer(folder, tmp_path):
    check_lora(load(folder), PLAIN, folder, tmp_path)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_draws_the_same(folder, tmp_path):
    check_full(load(folder, full=True), PLAIN, tmp_path)


def test_an_exported_pipeline_keeps_the_size_that_its_positions_are_built_for(tmp_path):
    tiny_pixart(sample_size=32).save_pretrained(tmp_path / "base")
    denoiser = load(tmp_path / "base", full=True)
    denoiser.export(tmp_path / "final")
    exported = PixArtSigmaPipeline.from_pretrained(tmp_path / "final")
    assert exported.transformer.config.sample_size == 32
    assert relative_error(sampled(denoiser, EXACT), PLAIN.drawn(tmp_path / "final", denoiser)) < 1e-4


def test_float16_keeps_t5_in_bfloat16(folder):
    pipeline = PixArtSigmaPipeline.from_pretrained(folder)
    denoiser = PixArtSigma(
        pipeline, ModelConfig(), device=torch.device("cpu"), compute_dtype=torch.float16, trainable=False
    )
    assert denoiser.encoders["text_encoder"].dtype == torch.bfloat16


def test_bf16_samples_finite_latents(folder):
    denoiser = load_denoiser(ModelConfig(path=str(folder)), mixed_precision="bf16", trainable=True)
    assert torch.isfinite(sampled(denoiser, EXACT)).all()


def test_a_language_model_is_not_trained(folder):
    with pytest.raises(ConfigError, match="train_text_encoder: that of a PixArtSigma is a language model"):
        load(folder, train_text_encoder=True)


def test_a_checkpoint_without_its_text_encoder_is_refused(folder, tmp_path):
    tiny_pixart().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    absent = {"text_encoder": [None, None], "tokenizer": [None, None]}
    file.write_text(json.dumps({**json.loads(file.read_text()), **absent}))
    with pytest.raises(CheckpointError, match="text_encoder"):
        load(tmp_path)


def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path):
    tiny_pixart().save_pretrained(tmp_path)
    file = tmp_path / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tokenizer": [None, None]}))
    with pytest.raises(CheckpointError, match="lacks the tokenizer of its text_encoder"):
        load(tmp_path)


def test_a_vae_that_overflows_in_float16_is_refused_there(folder):
    with pytest.raises(ConfigError, match="overflows in float16"):
        load(folder, vae_dtype="float16")


def test_a_scheduler_without_betas_has_no_steps_with_noise_and_is_refused(tmp_path):
    pipeline = tiny_pixart()
    pipeline.scheduler = CMStochasticIterativeScheduler()
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="CMStochasticIterativeScheduler") as caught:
        load(tmp_path)
    assert "DDIM" in caught.value.hint


def test_a_network_that_fills_holes_is_refused(tmp_path):
    tiny_pixart(in_channels=9).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="takes 9 channels, and a latent has 4"):
        load(tmp_path)


def test_an_exported_checkpoint_of_another_prediction_type_is_sampled_at_the_timesteps_of_the_run(tmp_path):
    tiny_pixart().save_pretrained(tmp_path / "base")
    denoiser = load(tmp_path / "base", full=True, prediction_type="v_prediction")
    denoiser.export(tmp_path / "final")
    again = load(tmp_path / "final")
    assert again.schedule.prediction_type == "v_prediction"
    ours, theirs = denoiser.make_sampler(EXACT), again.make_sampler(EXACT)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    assert torch.equal(ours.previous, theirs.previous)
