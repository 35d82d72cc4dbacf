"""`diffalign sample --adapter`: a LoRA on top of a checkpoint, by its weight."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from families import perturb
from PIL import Image

from diffalign.cli import main
from diffalign.cli.sample import parse_adapter
from diffalign.config import AdapterConfig
from diffalign.errors import ConfigError
from diffalign.seeding import sample_noise


def test_pictures_are_those_of_plain_diffusers_with_the_same_lora(make_denoiser, tiny_pipeline_dir, tmp_path):
    denoiser = make_denoiser()
    perturb(denoiser)
    denoiser.export(tmp_path / "lora")
    words = ["--model", str(tiny_pipeline_dir), "--prompts", "a red star", "--device", "cpu", "--steps", "3"]
    words += ["--guidance-scale", "2", "--output-dir", str(tmp_path / "out")]
    assert main(["sample", *words, "--adapter", f"{tmp_path / 'lora'}:20"]) == 0
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for weight in (0.0, 20.0):
        if weight:
            pipeline.load_lora_weights(tmp_path / "lora", adapter_name="one")
            pipeline.set_adapters(["one"], [weight])
        noise = sample_noise(denoiser.latent_shape, [0], "initial")
        options = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "np"}
        pictures.append(pipeline(["a red star"], latents=noise, **options).images[0])
    found = np.asarray(Image.open(tmp_path / "out" / "00000-s0.png")) / 255
    assert np.abs(found - pictures[1]).max() < 1 / 255
    assert np.abs(found - pictures[0]).max() > 4 / 255


def test_a_weight_follows_the_last_colon():
    assert parse_adapter("a.safetensors") == AdapterConfig(path="a.safetensors")
    assert parse_adapter("a.safetensors:-0.5") == AdapterConfig(path="a.safetensors", weight=-0.5)
    for text in ("a:0", "a:nan", ""):
        with pytest.raises(ConfigError, match="is not PATH or PATH:WEIGHT"):
            parse_adapter(text)
