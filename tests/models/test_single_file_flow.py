"""Single files in the original layouts of SD 3 and FLUX.1: a whole one loads, the transformer alone is refused."""

from __future__ import annotations

import pytest
import torch
from export_runs import tiny_sd3_of_stability
from families import SIDE, sampled, tiny_flux
from safetensors.torch import load_file, save_file

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError
from diffalign.exporting.original import original_weights
from diffalign.models.loading import load_denoiser


def write(pipeline, family, folder, without: tuple[str, ...] = ()) -> dict[str, object]:
    """The folder and the single file of a pipeline; the model options of the latter.

    Args:
        without: starts of names that the file lacks.
    """
    pipeline.save_pretrained(folder / "folder")
    named = original_weights(family, pipeline).items()
    weights = {name: tensor.clone() for name, tensor in named if not name.startswith(without)}
    save_file(weights, folder / "one.safetensors")
    paths = {"path": str(folder / "one.safetensors"), "single_file_config": str(folder / "folder")}
    return {**paths, "resolution": SIDE, "lora": None}


def test_a_single_file_of_sd3_draws_the_latents_of_its_folder(tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path)
    sampler = SamplerConfig(kind="euler", steps=2, guidance_scale=3.0)
    found = sampled(load_denoiser(ModelConfig.model_validate(options)), sampler)
    folder = ModelConfig(path=str(tmp_path / "folder"), resolution=SIDE, lora=None)
    assert torch.equal(found, sampled(load_denoiser(folder), sampler))


T5 = "text_encoders.t5xxl.transformer."
EULER = SamplerConfig(kind="euler", steps=2, guidance_scale=3.0)


def test_t5_may_have_its_embedding_once(tmp_path):
    once = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path, (f"{T5}encoder.embed_tokens",))
    folder = ModelConfig(path=str(tmp_path / "folder"), resolution=SIDE, lora=None)
    expected = sampled(load_denoiser(folder), EULER)
    assert torch.equal(sampled(load_denoiser(ModelConfig.model_validate(once)), EULER), expected)


def test_a_single_file_of_sd3_may_lack_t5(tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path, (T5,))
    denoiser = load_denoiser(ModelConfig.model_validate(options))
    assert list(denoiser.encoders) == ["text_encoder", "text_encoder_2"]
    pipeline = tiny_sd3_of_stability()
    pipeline.text_encoder_3 = pipeline.tokenizer_3 = None
    pipeline.save_pretrained(tmp_path / "without")
    without = ModelConfig(path=str(tmp_path / "without"), resolution=SIDE, lora=None)
    assert torch.equal(sampled(denoiser, EULER), sampled(load_denoiser(without), EULER))


@pytest.mark.parametrize(
    ("missing", "part"),
    [
        (f"{T5}encoder.final_layer_norm", "text_encoder_3"),
        ("text_encoders.clip_g.transformer.text_projection", "text_encoder_2"),
        ("text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp", "text_encoder"),
    ],
)
def test_a_weight_that_a_text_encoder_of_the_file_lacks_is_named(missing, part, tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path, (missing,))
    with pytest.raises(CheckpointError, match=rf"the {part} lacks \d+ of its weights"):
        load_denoiser(ModelConfig.model_validate(options))


def test_a_weight_of_the_transformer_that_is_left_over_is_named(tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path)
    name = "model.diffusion_model.joint_blocks.0.extra"
    save_file({**load_file(options["path"]), name: torch.ones(2)}, options["path"])
    with pytest.raises(CheckpointError, match=f"has 1 weights that its model has no place for: {name}"):
        load_denoiser(ModelConfig.model_validate(options))


def test_a_transformer_alone_is_refused_with_what_to_give(tmp_path):
    options = write(tiny_flux(), "Flux", tmp_path)
    with pytest.raises(CheckpointError, match="lacks some of the weights") as caught:
        load_denoiser(ModelConfig.model_validate(options))
    assert "CLIPTextModel" in caught.value.why
    assert "flux1-dev.safetensors" in caught.value.hint
