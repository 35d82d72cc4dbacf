"""Exported and loaded again by other libraries, a run's result draws the run's own pictures."""

from __future__ import annotations

import json

import pytest
from diffusers import DiffusionPipeline
from export_runs import ALPHA, FAMILIES, LORA, RANK, Exports, difference
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture(scope="module", params=FAMILIES)
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp(request.param), request.param)


def test_the_run_changed_its_pictures_and_more_than_a_wrong_alpha_would(exports: Exports):
    run = exports.run
    assert difference(run.pictures, run.before) > 10
    pipeline = run.base_pipeline()
    pipeline.load_lora_weights(load_file(exports["diffusers"] / LORA))  # without the header: alpha is lost
    assert difference(run.pictures_of(pipeline), run.pictures) > 5


def test_diffusers_loads_its_format(exports: Exports):
    pipeline = exports.run.base_pipeline()
    pipeline.load_lora_weights(exports["diffusers"])
    assert exports.draw_the_same(pipeline)
    network = pipeline.components.get("unet") or pipeline.transformer
    assert next(iter(network.peft_config.values())).lora_alpha == ALPHA


def test_diffusers_loads_the_merged_folder(exports: Exports):
    assert exports.draw_the_same(DiffusionPipeline.from_pretrained(exports["merged"]))


def test_peft_loads_its_format(exports: Exports):
    pipeline = exports.run.base_pipeline()
    found = [path.name for path in exports["peft"].iterdir()]
    assert {"text_encoder"} < set(found)
    for name in found:
        config = json.loads((exports["peft"] / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)
        model = PeftModel.from_pretrained(getattr(pipeline, name), exports["peft"] / name)
        setattr(pipeline, name, model.merge_and_unload())
    assert exports.draw_the_same(pipeline)


@pytest.mark.parametrize("exports", ["sd", "sdxl"], indirect=True)
def test_diffusers_loads_the_kohya_file(exports: Exports):
    tensors = load_file(exports["kohya"])
    assert {float(value) for key, value in tensors.items() if key.endswith(".alpha")} == {ALPHA}
    assert {len(value) for key, value in tensors.items() if key.endswith("lora_down.weight")} == {RANK}
    pipeline = exports.run.base_pipeline()
    pipeline.load_lora_weights(exports.folder, weight_name=exports["kohya"].name)
    assert exports.draw_the_same(pipeline)


@pytest.mark.parametrize("exports", ["sd", "sdxl", "sd3"], indirect=True)
def test_diffusers_loads_the_single_file(exports: Exports):
    pipeline_class = type(exports.run.base_pipeline())
    file, config = str(exports["single-file"]), str(exports.run.base)
    assert exports.draw_the_same(pipeline_class.from_single_file(file, config=config, local_files_only=True))


@pytest.mark.parametrize("exports", ["sd"], indirect=True)
def test_headers_say_where_a_file_comes_from(exports: Exports):
    with safe_open(exports["kohya"], framework="pt") as file:
        said = file.metadata()
    expected = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "run",
        "modelspec.resolution": "16x16",
        "modelspec.prediction_type": "epsilon",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "5.0",
        "ss_base_model_version": "sd_v1",
        "ss_v2": "False",
        "diffalign.method": "sft",
        "diffalign.rewards": "[]",
    }
    assert {key: said.get(key) for key in expected} == expected
    assert "lora:" in said["diffalign.config"]


@pytest.mark.parametrize("exports", ["sd"], indirect=True)
def test_merged_weights_carry_the_header_too(exports: Exports):
    weights = exports["merged"] / "unet" / "diffusion_pytorch_model.safetensors"
    with safe_open(weights, framework="pt") as file:
        said = file.metadata()
    assert said["format"] == "pt"
    assert said["modelspec.architecture"] == "stable-diffusion-v1"
