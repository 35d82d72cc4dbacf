"""Networks from configuration files alone, up to the full size of published models."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from weightless import configuration_of, write_architecture

from diffalign.assets import resolve
from diffalign.config import RUNS, ModelConfig, Run
from diffalign.errors import CheckpointError
from diffalign.estimate.architecture import Configuration, family_and_pipeline
from diffalign.estimate.run import estimate
from diffalign.estimate.subject import subject
from diffalign.models.lora import lora_layers

GIB = 2**30
WEIGHTS = "diffusion_pytorch_model.safetensors"
PUBLISHED = {
    "sdxl": ("UNet2DConditionModel", "unet", 2_567_463_684),
    "sd35-medium": ("SD3Transformer2DModel", "transformer", 2_243_171_520),
    "flux1-dev": ("FluxTransformer2DModel", "transformer", 11_901_408_320),
}
"""Architecture -> class and name of its network, and the parameters that the published weights have."""


def built(path: Path | str):
    config = ModelConfig(path=str(path))
    return family_and_pipeline(config, Configuration(config))


def test_a_folder_of_configuration_files_is_enough(tiny_pipeline_dir, tmp_path):
    folder = configuration_of(tiny_pipeline_dir, tmp_path)
    family, pipeline = built(folder)
    real = diffusers.StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    assert family.__name__ == "StableDiffusion"
    assert not Configuration(ModelConfig(path=str(folder))).has_weights
    for name in ("unet", "vae", "text_encoder"):
        shapes = {key: value.shape for key, value in getattr(pipeline, name).state_dict().items()}
        assert shapes == {key: value.shape for key, value in getattr(real, name).state_dict().items()}
        assert {value.device.type for value in getattr(pipeline, name).parameters()} == {"meta"}


def test_the_bundled_checkpoint_builds():
    _, pipeline = built("bundled:tiny-sd")
    with safe_open(resolve("bundled:tiny-sd") / "unet" / WEIGHTS, framework="pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert {name: list(value.shape) for name, value in pipeline.unet.state_dict().items()} == stored


def broken(folder: Path, how: str) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    if how == "part":
        (folder / "unet" / "config.json").unlink()
    elif how == "json":
        (folder / "vae" / "config.json").write_text("{")
    elif how == "family":
        index["_class_name"] = "StableDiffusionInpaintPipeline"
    elif how == "library":
        index["unet"] = ["os", "system"]
    elif how == "class":
        index["unet"] = ["diffusers", "DDIMPipeline"]
    elif how == "settings":
        settings = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**settings, "block_out_channels": [8]}))
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("part", "lacks unet/config.json"),
        ("json", r"vae/config.json of .* is not JSON"),
        ("family", "is a StableDiffusionInpaintPipeline, which is not supported"),
        ("library", "comes from a library that checkpoints may not name"),
        ("class", "is a DDIMPipeline, which the installed diffusers has no network for"),
        ("settings", "configuration of the unet of .* builds no UNet2DConditionModel"),
    ],
)
def test_what_cannot_be_built_is_named(tiny_pipeline_dir, tmp_path, how, expected):
    folder = configuration_of(tiny_pipeline_dir, tmp_path)
    broken(folder, how)
    with pytest.raises(CheckpointError, match=expected):
        built(folder)


def test_a_path_that_is_not_there_is_no_hub_id():
    with pytest.raises(CheckpointError, match="does not exist"):
        built("./nothing")


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_a_full_size_network_has_the_published_number_of_parameters(tmp_path, name):
    kind, part, parameters = PUBLISHED[name]
    folder = write_architecture(name, tmp_path)
    settings = json.loads((folder / part / "config.json").read_text())
    with torch.device("meta"):
        network = getattr(diffusers, kind).from_config(settings)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def run_of(folder: Path, **model: object) -> Run:
    return RUNS["dpo"](
        algorithm={"name": "dpo", "batch_size": 1},
        data={"path": "pairs.parquet"},
        model={"path": str(folder), "resolution": 512, "vae_slicing": True, **model},
        training={"mixed_precision": "bf16", "gradient_checkpointing": True},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layers", "least", "most"),
    # Layers: SDXL has 70 transformer blocks of two attentions with four projections each; SD 3.5 medium 24 blocks of
    # eight, the last without to_add_out, and 13 of them with another four; FLUX.1 19 of eight and 38 of three.
    # Memory: at least the weights in bf16 (and the VAE's in float32), which are known; at most a few GiB beyond.
    [("sdxl", 560, 6.6, 14), ("sd35-medium", 24 * 8 - 1 + 13 * 4, 15, 24), ("flux1-dev", 266, 31, 42)],
)
def test_a_full_size_model_is_estimated(tmp_path, name, layers, least, most):
    config = run_of(write_architecture(name, tmp_path))
    assert len(lora_layers(subject(config, "cuda").network)) == layers
    found = estimate(config, "cuda")
    assert least * GIB < found.peak < most * GIB
    assert found.flops["training"] > 0


def test_an_unset_text_encoder_stays_out(tmp_path):
    folder = write_architecture("sd35-medium", tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))
    small = json.loads((folder / "transformer" / "config.json").read_text()) | {"num_layers": 1}
    (folder / "transformer" / "config.json").write_text(json.dumps({**small, "dual_attention_layers": [0]}))
    _, pipeline = built(folder)
    assert pipeline.text_encoder_3 is None
    assert pipeline.text_encoder_2 is not None
