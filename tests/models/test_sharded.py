"""A checkpoint in shards, in a half-precision variant, or in both, loads as the one file that it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline
from torch import Tensor

from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError
from diffalign.models.loading import load_pipeline

PARTS = ("unet", "vae", "text_encoder")
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def weights(folder: Path, **options: object) -> dict[str, Tensor]:
    pipeline = load_pipeline(ModelConfig(path=str(folder), lora=None, **options))
    found = {
        f"{part}.{name}": t for part in PARTS for name, t in getattr(pipeline, part).state_dict().items()
    }
    assert {tensor.dtype for tensor in found.values() if tensor.is_floating_point()} == {torch.float32}
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_shards_load_as_the_whole(tiny_pipeline_dir, tmp_path):
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(set(json.loads((tmp_path / "unet" / INDEX).read_text())["weight_map"].values())) > 2
    assert same(weights(tmp_path), weights(tiny_pipeline_dir))


@pytest.mark.parametrize("size", ["60KB", "1GB"])
def test_a_variant_is_taken_where_it_is_asked_for(tiny_pipeline_dir, tmp_path, size):
    half = tiny_pipeline().to(torch.float16)
    half.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    expected = {
        name: tensor.half().float() if tensor.is_floating_point() else tensor
        for name, tensor in weights(tiny_pipeline_dir).items()
    }
    assert same(weights(tmp_path, variant="fp16"), expected)
    with pytest.raises(CheckpointError):
        weights(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_shard_that_is_missing_or_damaged_is_an_error(tmp_path, damage):
    tiny_pipeline().save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted((tmp_path / "unet").glob("*-of-*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        weights(tmp_path)
    assert caught.value.hint
