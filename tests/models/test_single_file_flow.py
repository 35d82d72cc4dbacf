"""Single files in the original layouts of SD 3 and FLUX.1: whole, or the transformer beside a folder of the rest."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from diffusers import FluxTransformer2DModel
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


@pytest.mark.slow
def test_a_transformer_alone_is_put_into_the_pipeline_that_has_the_rest(tmp_path):
    """At FLUX.1's own width, the only one that diffusers converts: 0.5 billion weights in two blocks."""
    pipeline = tiny_flux()
    settings = {**pipeline.transformer.config, "attention_head_dim": 128, "num_attention_heads": 24}
    pipeline.register_modules(
        transformer=FluxTransformer2DModel(**settings | {"axes_dims_rope": (16, 56, 56)})
    )
    options = write(pipeline, "Flux", tmp_path)
    sampler = SamplerConfig(kind="euler", steps=1, guidance_scale=3.0)
    folder = ModelConfig(path=str(tmp_path / "folder"), resolution=SIDE, lora=None)
    expected = sampled(load_denoiser(folder), sampler)
    shutil.rmtree(tmp_path / "folder" / "transformer")
    (tmp_path / "folder" / "transformer").mkdir()
    pipeline.transformer.save_config(tmp_path / "folder" / "transformer")
    found = load_denoiser(ModelConfig.model_validate(options))
    assert torch.equal(sampled(found, sampler), expected)

    weights = load_file(options["path"])
    lost = "double_blocks.0.img_mlp.0.weight"
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, options["path"])
    with pytest.raises(CheckpointError):
        load_denoiser(ModelConfig.model_validate(options))


def test_a_transformer_alone_needs_a_folder_with_all_the_rest(tmp_path):
    options = write(tiny_flux(), "Flux", tmp_path)
    shutil.rmtree(tmp_path / "folder" / "text_encoder")
    with pytest.raises(CheckpointError, match="folder has no safetensors weights for its text_encoder"):
        load_denoiser(ModelConfig.model_validate(options))


def test_a_file_of_another_network_alone_is_refused(tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path)
    index = json.loads((tmp_path / "folder" / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "AutoPipelineForText2Image"]
    (tmp_path / "folder" / "model_index.json").write_text(json.dumps(index))
    weights = {name: value for name, value in load_file(options["path"]).items() if name.startswith("model.")}
    save_file(weights, options["path"])
    with pytest.raises(CheckpointError, match="folder has no transformer that a single file could hold"):
        load_denoiser(ModelConfig.model_validate(options))


def test_a_transformer_of_sd3_alone_is_put_into_the_pipeline_that_has_the_rest(tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path)
    weights = {name: value for name, value in load_file(options["path"]).items() if name.startswith("model.")}
    save_file(weights, options["path"])
    folder = ModelConfig(path=str(tmp_path / "folder"), resolution=SIDE, lora=None)
    expected = sampled(load_denoiser(folder), EULER)
    assert torch.equal(sampled(load_denoiser(ModelConfig.model_validate(options)), EULER), expected)
