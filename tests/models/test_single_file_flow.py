"""Single files in the original layouts of SD 3 and FLUX.1: a whole one loads, the transformer alone is refused."""

from __future__ import annotations

import pytest
import torch
from export_runs import tiny_sd3_of_stability
from families import SIDE, sampled, tiny_flux
from safetensors.torch import save_file

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError
from diffalign.exporting.original import original_weights
from diffalign.models.loading import load_denoiser


def write(pipeline, family, folder) -> dict[str, object]:
    """The folder and the single file of a pipeline; the model options of the latter."""
    pipeline.save_pretrained(folder / "folder")
    weights = {name: tensor.clone() for name, tensor in original_weights(family, pipeline).items()}
    save_file(weights, folder / "one.safetensors")
    paths = {"path": str(folder / "one.safetensors"), "single_file_config": str(folder / "folder")}
    return {**paths, "resolution": SIDE, "lora": None}


def test_a_single_file_of_sd3_draws_the_latents_of_its_folder(tmp_path):
    options = write(tiny_sd3_of_stability(), "StableDiffusion3", tmp_path)
    sampler = SamplerConfig(kind="euler", steps=2, guidance_scale=3.0)
    found = sampled(load_denoiser(ModelConfig.model_validate(options)), sampler)
    folder = ModelConfig(path=str(tmp_path / "folder"), resolution=SIDE, lora=None)
    assert torch.equal(found, sampled(load_denoiser(folder), sampler))


def test_a_transformer_alone_is_refused_with_what_to_give(tmp_path):
    options = write(tiny_flux(), "Flux", tmp_path)
    with pytest.raises(CheckpointError, match="lacks some of the weights") as caught:
        load_denoiser(ModelConfig.model_validate(options))
    assert "CLIPTextModel" in caught.value.why
    assert "flux1-dev.safetensors" in caught.value.hint
