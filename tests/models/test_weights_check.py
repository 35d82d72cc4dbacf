"""A checkpoint whose files are damaged, lack weights, or hold weights of another model is refused, with names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import load, tiny_sd3
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config import ModelConfig
from diffalign.errors import CheckpointError
from diffalign.models.loading import load_denoiser
from diffalign.models.weights_check import stored_names

FILES = {
    "transformer": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_3": "model.safetensors",
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "sd3"
    tiny_sd3().save_pretrained(path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "sd3")


def change(folder: Path, part: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    file = folder / part / FILES[part]
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def refusal(folder: Path, **options: object) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(ModelConfig(path=str(folder), lora=None, **options))
    assert caught.value.where is not None
    assert str(folder) in caught.value.where
    assert caught.value.hint
    return caught.value


MISSING = {
    "transformer": "transformer_blocks.0.attn.to_q.weight",
    "vae": "decoder.conv_in.bias",
    "text_encoder": "text_model.encoder.layers.0.mlp.fc1.weight",
    "text_encoder_3": "encoder.block.0.layer.0.SelfAttention.q.weight",
}


@pytest.mark.parametrize(("part", "name"), MISSING.items(), ids=MISSING)
def test_a_missing_weight_is_named_and_never_random(folder, part, name):
    change(folder, part, lambda weights: weights.pop(name))
    error = refusal(folder)
    assert error.what == f"the {part} lacks 1 of its weights: {name}"
    assert "random" in error.why


def test_many_missing_weights_are_counted(folder):
    change(folder, "vae", lambda weights: [weights.pop(name) for name in list(weights) if "encoder" in name])
    assert " and " in refusal(folder).what


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_weight_that_the_network_has_no_place_for_is_named(folder, part):
    change(folder, part, lambda weights: weights.update({"extra.weight": torch.ones(1)}))
    error = refusal(folder)
    assert error.what == f"the {part} has 1 weights that its model has no place for: extra.weight"


def test_a_text_encoder_may_come_with_its_other_half(folder):
    change(folder, "text_encoder_3", lambda weights: weights.update({"decoder.extra": torch.ones(1)}))
    load(folder)


def test_a_config_of_another_size_is_refused(folder):
    file = folder / "vae" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layers_per_block": 2}))
    assert "decoder.up_blocks.0.resnets.2" in refusal(folder).what


def test_an_old_autoencoder_loads_under_its_old_names(folder):
    attention = "encoder.mid_block.attentions.0"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, Tensor]) -> None:
        for new, name in old.items():
            for kind in ("weight", "bias"):
                weights[f"{attention}.{name}.{kind}"] = weights.pop(f"{attention}.{new}.{kind}")

    before = load(folder).vae.state_dict()
    change(folder, "vae", rename)
    after = load(folder).vae.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("part", FILES)
def test_a_file_that_was_cut_off_is_named(folder, part):
    file = folder / part / FILES[part]
    file.write_bytes(file.read_bytes()[:-100])
    error = refusal(folder)
    assert error.what == f"{file.name} is damaged"
    assert error.where == str(file)


def in_shards(folder: Path) -> list[str]:
    """Save the transformer in several files; their names."""
    part = folder / "transformer"
    load(folder, full=True).pipeline.transformer.save_pretrained(part, max_shard_size="20KB")
    (part / FILES["transformer"]).unlink(missing_ok=True)
    names = sorted(file.name for file in part.glob("*.safetensors"))
    assert len(names) > 2
    return names


def test_a_missing_shard_is_named(folder):
    shard = in_shards(folder)[1]
    (folder / "transformer" / shard).unlink()
    error = refusal(folder)
    assert error.what == f"transformer lacks 1 of its weight files: {shard}"


def test_a_damaged_shard_is_named(folder):
    file = folder / "transformer" / in_shards(folder)[1]
    file.write_bytes(b"\x10" + file.read_bytes()[1:])
    assert refusal(folder).where == str(file)


def test_a_shard_that_lacks_a_weight_of_its_index_is_refused(folder):
    file = folder / "transformer" / in_shards(folder)[0]
    weights = load_file(file)
    name = next(iter(weights))
    weights.pop(name)
    save_file(weights, file, metadata={"format": "pt"})
    assert refusal(folder).what == f"the transformer lacks 1 of its weights: {name}"


def test_parts_of_different_types_load_as_float32(folder):
    change(folder, "transformer", lambda w: w.update({n: v.half() for n, v in w.items()}))
    change(folder, "text_encoder_3", lambda w: w.update({n: v.bfloat16() for n, v in w.items()}))
    change(folder, "vae", lambda w: w.update({n: v.half() for n, v in w.items() if "bias" in n}))
    denoiser = load(folder)
    dtypes = {tensor.dtype for part in denoiser.networks().values() for tensor in part.parameters()}
    assert dtypes == {torch.float32}


def test_the_variant_is_what_is_looked_at(folder):
    plain = folder / "transformer" / FILES["transformer"]
    weights = load_file(plain)
    save_file({"other": torch.ones(1)}, plain, metadata={"format": "pt"})
    save_file(weights, plain.with_name("diffusion_pytorch_model.fp16.safetensors"), metadata={"format": "pt"})
    assert stored_names(folder / "transformer", None) == {"other"}
    assert stored_names(folder / "transformer", "fp16") == set(weights)
    load(folder, variant="fp16")
    assert "transformer" in refusal(folder).what


@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_3"])
@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)], ids=["nothing", "config"])
def test_a_tokenizer_without_its_files_is_refused_instead_of_an_empty_one(folder, part, left):
    for file in (folder / part).iterdir():
        if file.name not in left:
            file.unlink()
    error = refusal(folder)
    assert error.what == f"the {part} has no vocabulary"
    shutil.rmtree(folder / part)
    assert refusal(folder).what == error.what


@pytest.mark.parametrize("part", ["text_encoder", "vae", "transformer"])
def test_a_network_that_the_index_does_not_name_is_named(folder, part):
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: [None, None]}))
    error = refusal(folder)
    assert error.what == f"{folder} has no {part}"
    assert "text_encoder_2" in error.why


@pytest.mark.parametrize("part", ["transformer", "text_encoder"])
def test_weights_that_are_stored_quantised_are_refused(folder, part):
    file = folder / part / "config.json"
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": stored}))
    assert "model.quantization" in refusal(folder).hint
