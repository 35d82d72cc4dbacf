from __future__ import annotations

import pytest
from families import SIDE, tiny_flux, tiny_sd3, tiny_sdxl
from newer_families import tiny_pixart, tiny_sana, tiny_z_image
from weightless import configuration_of

from diffalign.config import RUNS, Run
from diffalign.estimate.counting import stored_bytes, weights_of
from diffalign.estimate.run import estimate
from diffalign.estimate.subject import subject


def dpo(folder, **model: object) -> Run:
    return RUNS["dpo"](
        algorithm={"name": "dpo", "batch_size": 1},
        data={"path": "pairs.parquet"},
        model={"path": str(folder), "resolution": SIDE, **model},
        training={"mixed_precision": "bf16"},
    )


@pytest.mark.parametrize("build", [tiny_sdxl, tiny_sd3, tiny_flux, tiny_pixart, tiny_sana, tiny_z_image])
def test_every_family_is_estimated_from_its_configuration(tmp_path, build):
    build().save_pretrained(tmp_path / "whole")
    folder = configuration_of(tmp_path / "whole", tmp_path)
    found = estimate(dpo(folder), "cuda")
    assert found.peak_phase in found.totals
    assert {"training", "encoding pictures", "encoding prompts"} == set(found.totals)
    assert found.flops["training"] > 0


def test_a_quantised_base_is_smaller_and_its_layers_still_compute(tiny_pipeline_dir):
    sizes = {}
    for how in (None, "int8", "nf4"):
        network = subject(dpo(tiny_pipeline_dir, quantization=how), "cuda").network
        sizes[how] = stored_bytes(weights_of(network))
    assert sizes["nf4"] < sizes["int8"] < sizes[None]
    assert estimate(dpo(tiny_pipeline_dir, quantization="nf4"), "cuda").flops["training"] > 0


def test_offloaded_encoders_count_while_they_encode_only(tiny_pipeline_dir):
    whole, offloaded = (
        estimate(dpo(tiny_pipeline_dir, offload_text_encoders=away), "cuda") for away in (False, True)
    )
    encoder = sum(part.bytes for part in whole.standing if part.name.startswith("text_encoder"))
    assert whole.total("training") - offloaded.total("training") == encoder > 0
    assert whole.total("encoding prompts") == offloaded.total("encoding prompts")
