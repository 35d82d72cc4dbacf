"""The result of a LoRA run of every family: its adapter, fused into its base model, is the policy that was trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import load, perturb, relative_error, sampled, tiny_flux, tiny_sd3, tiny_sdxl
from newer_families import tiny_pixart, tiny_sana, tiny_z_image

from diffalign.config import SamplerConfig
from diffalign.models.loading import family_at, load_for_inference

DIFFUSION = SamplerConfig(steps=3, eta=0.0, guidance_scale=3.0)
FLOW = SamplerConfig(kind="euler", steps=3, guidance_scale=3.0)
FAMILIES = {
    "sdxl": (tiny_sdxl, DIFFUSION, True),
    "sd3": (tiny_sd3, FLOW, True),
    "flux": (tiny_flux, FLOW, True),
    "pixart-sigma": (tiny_pixart, DIFFUSION, False),
    "sana": (tiny_sana, FLOW, False),
    "z-image": (tiny_z_image, FLOW, False),
}
"""Pipeline, sampler, and whether its text encoders train."""


@pytest.mark.parametrize(("build", "sampler", "text_encoders"), FAMILIES.values(), ids=FAMILIES)
def test_a_run_folder_is_sampled_with_what_it_learned(
    build: Callable[[], Any], sampler: SamplerConfig, text_encoders: bool, tmp_path: Path
):
    build().save_pretrained(tmp_path / "base")
    denoiser = load(tmp_path / "base", train_text_encoder=text_encoders)
    base = sampled(denoiser, sampler)
    perturb(denoiser)
    (tmp_path / "run").mkdir()
    denoiser.export(tmp_path / "run" / "final")
    (tmp_path / "run" / "config.yaml").write_text(
        f"algorithm: {{name: sft}}\nmodel: {{path: {tmp_path / 'base'}, resolution: 16}}\ndata: {{path: unused}}\n"
    )
    assert family_at(str(tmp_path / "run")) is family_at(str(tmp_path / "base")) is type(denoiser)
    loaded = load_for_inference(str(tmp_path / "run"), device="cpu")
    trained = sampled(denoiser, sampler)
    assert relative_error(trained, base) > 1e-2
    assert relative_error(sampled(loaded, sampler), trained) < 1e-3
