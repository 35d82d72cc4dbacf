"""rsLoRA, ranks by module and DoRA in the formats that can hold them."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from export_runs import LORA, Exports, FinishedRun
from peft import PeftModel

from diffalign.errors import ConfigError
from diffalign.exporting.formats import export_result
from diffalign.exporting.source import find_result


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Ranks and scales differ by module."""
    options = {"kind": "rslora", "rank_by_module": {"attn2.to_k": 4}, "text_encoder": False}
    return Exports(tmp_path_factory.mktemp("uneven"), "sd", ["diffusers", "kohya", "peft"], **options)


@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft"])
def test_ranks_and_scales_by_module_survive(form: str, uneven: Exports):
    pipeline = uneven.run.base_pipeline()
    if form == "peft":
        pipeline.unet = PeftModel.from_pretrained(pipeline.unet, uneven["peft"] / "unet").merge_and_unload()
    else:
        where = uneven.folder if form == "kohya" else uneven["diffusers"]
        name = uneven["kohya"].name if form == "kohya" else LORA
        pipeline.load_lora_weights(where, weight_name=name)
    assert uneven.draw_the_same(pipeline)


def test_a_dora_keeps_its_magnitudes(tmp_path: Path):
    dora = Exports(tmp_path, "sd", ["diffusers", "peft", "merged"], kind="dora")
    pipeline = dora.run.base_pipeline()
    pipeline.load_lora_weights(dora["diffusers"])
    assert dora.draw_the_same(pipeline)
    pipeline = dora.run.base_pipeline()
    for name in ("unet", "text_encoder"):
        adapted = PeftModel.from_pretrained(getattr(pipeline, name), dora["peft"] / name)
        setattr(pipeline, name, adapted.merge_and_unload())
    assert dora.draw_the_same(pipeline)
    assert dora.draw_the_same(DiffusionPipeline.from_pretrained(dora["merged"]))


def test_adapters_that_a_run_started_with_are_part_of_it(uneven: Exports, tmp_path: Path):
    start = [{"path": str(uneven["diffusers"]), "mode": "freeze"}]
    over = Exports(tmp_path, "sd", ["kohya", "merged"], adapters=start, text_encoder=False)
    pipeline = over.run.base_pipeline()
    pipeline.load_lora_weights(over.folder, weight_name=over["kohya"].name)
    assert over.draw_the_same(pipeline)
    assert over.draw_the_same(DiffusionPipeline.from_pretrained(over["merged"]))


def test_the_file_of_flux_has_no_place_for_a_text_encoder_that_an_adapter_changed(tmp_path: Path):
    under = FinishedRun(tmp_path / "under", "flux")
    start = [{"path": str(under.path), "mode": "freeze"}]
    over = FinishedRun(tmp_path / "over", "flux", adapters=start, text_encoder=False)
    with pytest.raises(ConfigError, match="changed a text encoder too"):
        export_result(find_result(str(over.path)), "single-file", tmp_path / "flux.safetensors")
    assert not (tmp_path / "flux.safetensors").exists()
