"""What `model.path` accepts, and the one clear screen for everything else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError, DeviceError
from diffalign.models.loading import family_at, load_denoiser, pick_device
from diffalign.models.stable_diffusion import StableDiffusion
from diffalign.models.stable_diffusion_3 import StableDiffusion3


def refusal(path: object, **options: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(ModelConfig(path=str(path), lora=None, **options))
    assert caught.value.hint
    return caught.value.render()


@pytest.fixture
def copied(tiny_pipeline_dir, tmp_path):
    return shutil.copytree(tiny_pipeline_dir, tmp_path / "copy")


def test_a_path_that_does_not_exist(tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_hub_id_that_cannot_be_read(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = refusal("nobody/nothing-of-this-name", revision="v9")
    assert "neither a local path nor a hub model" in text
    assert "revision v9" in text


def test_a_pickle_checkpoint_is_refused_unopened(tmp_path):
    file = tmp_path / "model.ckpt"
    file.write_bytes(b"not even a pickle")
    assert "pickle checkpoint" in refusal(file)


def test_a_folder_without_model_index(tmp_path):
    assert "model_index.json" in refusal(tmp_path)


def test_another_pipeline_is_named(copied):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(json.dumps({**index, "_class_name": "PixArtAlphaPipeline"}))
    text = refusal(copied)
    assert "is a PixArtAlphaPipeline" in text
    for supported in ("StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"):
        assert supported in text


def test_an_inpainting_pipeline_is_refused(copied):
    index = json.loads((copied / "model_index.json").read_text())
    (copied / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"})
    )
    assert "no inpainting" in refusal(copied)


def test_a_single_file_of_a_refiner_is_known_by_its_weights(tmp_path):
    file = tmp_path / "refiner.safetensors"
    save_file({"conditioner.embedders.0.model.ln_final.weight": torch.ones(1)}, file)
    assert "is a StableDiffusionXLImg2ImgPipeline, which is not supported" in refusal(file)


def test_pickle_weights_in_a_folder_are_refused(copied):
    (copied / "unet" / "diffusion_pytorch_model.safetensors").rename(
        copied / "unet" / "diffusion_pytorch_model.bin"
    )
    text = refusal(copied)
    assert "no safetensors weights for its unet" in text
    assert "only pickle files" in text


def test_missing_weights_are_named(copied):
    (copied / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    text = refusal(copied)
    assert "no safetensors weights for its vae" in text
    assert "missing" in text


def test_truncated_weights_are_an_error(copied):
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot load" in refusal(copied) or "damaged" in refusal(copied)


def test_a_file_of_another_kind(tmp_path):
    file = tmp_path / "weights.txt"
    file.write_text("hello")
    assert "not a .safetensors file" in refusal(file)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_and_absent():
    with pytest.raises(DeviceError, match="no CUDA device"):
        pick_device("cuda")


def test_fp16_on_the_cpu_is_refused(tiny_pipeline_dir):
    with pytest.raises(DeviceError, match="fp16 needs a GPU"):
        load_denoiser(ModelConfig(path=str(tiny_pipeline_dir)), mixed_precision="fp16")


def test_the_family_is_told_by_the_index_or_by_the_names_of_the_weights(copied, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert family_at(str(copied)) is StableDiffusion
    for weight, family in (("input_blocks.0", StableDiffusion), ("joint_blocks.0", StableDiffusion3)):
        save_file({f"model.diffusion_model.{weight}": torch.zeros(1)}, tmp_path / "one.safetensors")
        assert family_at(str(tmp_path / "one.safetensors")) is family
    (copied / "model_index.json").write_text("[")
    (tmp_path / "bad.safetensors").write_bytes(b"bad")
    for path in (copied, tmp_path, tmp_path / "bad.safetensors", tmp_path / "nowhere", "nobody/nothing"):
        assert family_at(str(path)) is None
