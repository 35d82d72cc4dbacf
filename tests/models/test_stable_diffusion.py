from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close

from diffalign.config import LoRAConfig, ModelConfig, SamplerConfig
from diffalign.errors import ConfigError
from diffalign.models.loading import load_denoiser, load_for_inference
from diffalign.sampling import generate

PROMPTS = ["a red star", "two blue rings"]


def perturb(denoiser) -> None:
    """Move every trainable weight, as training would."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in denoiser.trainable_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))


def prediction(denoiser) -> torch.Tensor:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser.predict(x, torch.tensor([10, 900]), denoiser.encode_prompts(PROMPTS))


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_the_reference_stays_where_the_policy_started(make_denoiser, full, text_encoder):
    denoiser = make_denoiser(full=full, train_text_encoder=text_encoder)
    start = prediction(denoiser)
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)
    perturb(denoiser)
    assert float((prediction(denoiser) - start).abs().max()) > 1e-3
    with denoiser.reference():
        assert torch.equal(prediction(denoiser), start)


def test_lora_trains_its_adapter_only_in_float32(make_denoiser):
    denoiser = make_denoiser(mixed_precision="bf16")
    parameters = denoiser.trainable_parameters()
    assert parameters
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in parameters.items())
    assert denoiser.unet.dtype == torch.bfloat16


def test_full_fine_tuning_keeps_float32_weights_under_mixed_precision(make_denoiser):
    denoiser = make_denoiser(full=True, mixed_precision="bf16")
    assert all(p.dtype == torch.float32 for p in denoiser.trainable_parameters().values())
    assert len(denoiser.trainable_parameters()) == len(list(denoiser.unet.parameters()))


def test_lora_alpha_scales_the_update(tiny_pipeline_dir):
    shifts = []
    for alpha in (2.0, 4.0):
        config = ModelConfig(path=str(tiny_pipeline_dir), lora=LoRAConfig(rank=2, alpha=alpha))
        denoiser = load_denoiser(config, trainable=True)
        start = prediction(denoiser)
        with torch.no_grad():
            for name, parameter in denoiser.trainable_parameters().items():
                if "lora_B" in name:
                    parameter.fill_(1e-3)
        shifts.append(float((prediction(denoiser) - start).norm()))
    assert_close(shifts[1] / shifts[0], 2.0, atol=0.02, rtol=0)  # first order in alpha


def test_an_adapter_that_matches_nothing_is_an_error(tiny_pipeline_dir):
    config = ModelConfig(path=str(tiny_pipeline_dir), lora=LoRAConfig(target_modules=["to_x"]))
    with pytest.raises(ConfigError, match="no module of UNet2DConditionModel matches to_x") as caught:
        load_denoiser(config, trainable=True)
    assert "to_q" in caught.value.hint


def test_prompts_have_one_embedding_alone_or_in_a_batch(make_denoiser):
    one = make_denoiser().encode_prompts(["a red star"]).embeddings
    many = make_denoiser().encode_prompts(["something else", "a red star"]).embeddings
    assert_close(one[0], many[1], atol=1e-6, rtol=1e-5)


def test_a_long_prompt_is_cut_before_the_end_token(make_denoiser):
    denoiser = make_denoiser()
    tokens = denoiser.pipeline.tokenizer("x" * 500, truncation=True, max_length=16).input_ids
    assert len(tokens) == 16
    assert tokens[-1] == denoiser.pipeline.tokenizer.eos_token_id
    a, b = denoiser.encode_prompts(["a" * 500, "b" * 500]).embeddings
    assert not torch.equal(a, b)


def test_latents_have_about_the_scale_of_the_vae_and_round_trip_shapes(make_denoiser):
    denoiser = make_denoiser()
    latents = denoiser.encode_images(torch.rand(2, 3, 16, 16))
    assert latents.shape == (2, 4, 8, 8)
    pictures = denoiser.decode(latents)
    assert pictures.shape == (2, 3, 16, 16)
    assert float(pictures.min()) >= 0
    assert float(pictures.max()) <= 1


@pytest.mark.parametrize("text_encoder", [False, True])
@pytest.mark.parametrize("alpha", [None, 5.0])
def test_exported_lora_loads_in_plain_diffusers_and_gives_the_same_pictures(
    make_denoiser, tiny_pipeline_dir, tmp_path, alpha, text_encoder
):
    config = ModelConfig(
        path=str(tiny_pipeline_dir), lora=LoRAConfig(rank=2, alpha=alpha), train_text_encoder=text_encoder
    )
    denoiser = load_denoiser(config, trainable=True)
    perturb(denoiser)
    sampler = SamplerConfig(steps=4, eta=0.0, guidance_scale=3.0)
    ours = generate(denoiser, PROMPTS, [1, 2], sampler, 2)
    denoiser.export(tmp_path / "final")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipeline.load_lora_weights(tmp_path / "final")
    assert_close(run_plain(pipeline, denoiser, sampler), ours, atol=1 / 255, rtol=0)


def test_an_exported_full_pipeline_loads_in_plain_diffusers_and_gives_the_same_pictures(
    make_denoiser, tmp_path
):
    denoiser = make_denoiser(full=True)
    perturb(denoiser)
    sampler = SamplerConfig(steps=4, eta=0.0, guidance_scale=3.0)
    ours = generate(denoiser, PROMPTS, [1, 2], sampler, 2)
    denoiser.export(tmp_path / "final")
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "final", safety_checker=None)
    assert_close(run_plain(pipeline, denoiser, sampler), ours, atol=1 / 255, rtol=0)
    again = load_for_inference(str(tmp_path / "final"), device="cpu")
    assert_close(generate(again, PROMPTS, [1, 2], sampler, 2), ours, atol=1e-4, rtol=0)


def run_plain(pipeline, denoiser, sampler: SamplerConfig) -> torch.Tensor:
    from diffalign.seeding import sample_noise

    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        PROMPTS,
        latents=sample_noise(denoiser.latent_shape, [1, 2], "initial"),
        num_inference_steps=sampler.steps,
        guidance_scale=sampler.guidance_scale,
        output_type="pt",
    ).images.float()


def test_a_resolution_that_no_latent_fits_is_refused(tiny_pipeline_dir):
    with pytest.raises(ConfigError, match="not a multiple of 2"):
        load_denoiser(ModelConfig(path=str(tiny_pipeline_dir), resolution=17))


def test_more_steps_than_timesteps_are_refused(make_denoiser):
    with pytest.raises(ConfigError, match="more than the 1000 timesteps"):
        make_denoiser().make_sampler(SamplerConfig(steps=1001))


def test_zero_terminal_snr_needs_v_prediction(tiny_pipeline_dir):
    with pytest.raises(ConfigError, match="epsilon-prediction checkpoint cannot"):
        load_denoiser(ModelConfig(path=str(tiny_pipeline_dir), zero_terminal_snr=True))
    config = ModelConfig(path=str(tiny_pipeline_dir), zero_terminal_snr=True, prediction_type="v_prediction")
    denoiser = load_denoiser(config)
    assert float(denoiser.schedule.alphas_cumprod[-1]) == 0
    assert int(denoiser.make_sampler(SamplerConfig(steps=5)).timesteps[0]) == 999
