"""A single .safetensors file in the layout of the original Stable Diffusion loads like the folder it came from."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from families import load, sampled, tiny_sdxl
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.config import ModelConfig, SamplerConfig
from diffalign.errors import CheckpointError
from diffalign.models.families import pipeline_of_file
from diffalign.models.loading import load_denoiser
from diffalign.sampling import generate

LAYERS = 1  # of the tiny pipeline, per block

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def original_unet_key(key: str, attention: set[str]) -> str:
    """diffusers' name of a UNet weight -> its name in the CompVis layout."""
    for ours, theirs in UNET.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    if ".resnets." in key:
        for ours, theirs in RESNET.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
    if match := re.match(r"mid_block\.(\w+\.\d)\.(.*)", key):
        return f"middle_block.{MIDDLE[match[1]]}.{match[2]}"
    match = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match, key
    way, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (LAYERS + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        place = 2 if f"up_blocks.{block}" in attention else 1
        return f"output_blocks.{block * (LAYERS + 1) + LAYERS}.{place}.{rest}"
    number = block * (LAYERS + 1) + index + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{number}.{int(kind == 'attentions')}.{rest}"


VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_vae_entry(key: str, value: Tensor, blocks: int) -> tuple[str, Tensor]:
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.match(r"(\w+)\.mid_block\.attentions\.0\.(.*)\.(weight|bias)", key):
        key = f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
        return key, value[:, :, None, None] if value.ndim == 2 else value  # 1x1 convolutions there
    key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = re.sub(r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2", key)
    key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(
        r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{blocks - 1 - int(m[1])}.block.{m[2]}", key
    )
    return re.sub(
        r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{blocks - 1 - int(m[1])}.upsample", key
    ), value


OPEN_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def original_open_clip(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """SDXL's second text encoder as open_clip names it: query, key and value in one tensor."""
    weights = {
        key if key.startswith("text_") else f"text_model.{key}": value for key, value in weights.items()
    }
    tensors = {
        "positional_embedding": weights.pop("text_model.embeddings.position_embedding.weight"),
        "text_projection": weights.pop("text_projection.weight").T,
    }
    for key, value in weights.items():
        for ours, theirs in OPEN_CLIP.items():
            key = key.replace(ours, theirs)
        if match := re.match(r"(.*)\.self_attn\.q_proj\.(weight|bias)", key):
            source = match[1].replace("transformer.resblocks", "text_model.encoder.layers")
            parts = [weights[f"{source}.self_attn.{part}_proj.{match[2]}"] for part in "qkv"]
            tensors[f"{match[1]}.attn.in_proj_{match[2]}"] = torch.cat(parts)
        elif "self_attn" not in key:
            tensors[key] = value
    return tensors


def write_original_layout(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline, file: Path) -> None:
    tensors: dict[str, Tensor] = {}
    unet = pipeline.unet.state_dict()
    attention = {".".join(key.split(".")[:2]) for key in unet if ".attentions." in key}
    for key, value in unet.items():
        tensors[f"model.diffusion_model.{original_unet_key(key, attention)}"] = value
    for key, value in pipeline.vae.state_dict().items():
        name, tensor = original_vae_entry(key, value, len(pipeline.vae.config.block_out_channels))
        tensors[f"first_stage_model.{name}"] = tensor
    is_xl = isinstance(pipeline, StableDiffusionXLPipeline)
    encoder = "conditioner.embedders.0" if is_xl else "cond_stage_model"
    for key, value in pipeline.text_encoder.state_dict().items():
        tensors[f"{encoder}.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    if is_xl:
        for key, value in original_open_clip(pipeline.text_encoder_2.state_dict()).items():
            tensors[f"conditioner.embedders.1.model.{key}"] = value
    save_file({key: value.contiguous() for key, value in tensors.items()}, file)


def test_a_single_file_draws_the_pictures_of_its_folder(tiny_pipeline_dir, tmp_path):
    file = tmp_path / "model.safetensors"
    write_original_layout(StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir), file)
    folder = load_denoiser(ModelConfig(path=str(tiny_pipeline_dir), lora=None))
    single = load_denoiser(ModelConfig(path=str(file), single_file_config=str(tiny_pipeline_dir), lora=None))
    sampler = SamplerConfig(steps=3, eta=0.0, guidance_scale=2.0)
    expected = generate(folder, ["a", "bc"], [0, 1], sampler, 2)
    torch.testing.assert_close(generate(single, ["a", "bc"], [0, 1], sampler, 2), expected)


def test_a_single_file_of_sdxl_draws_the_latents_of_its_folder(tmp_path):
    tiny_sdxl().save_pretrained(tmp_path / "folder")
    write_original_layout(
        StableDiffusionXLPipeline.from_pretrained(tmp_path / "folder"), tmp_path / "xl.safetensors"
    )
    assert pipeline_of_file(tmp_path / "xl.safetensors", ModelConfig()) == "StableDiffusionXLPipeline"
    config = {"path": str(tmp_path / "xl.safetensors"), "single_file_config": str(tmp_path / "folder")}
    sampler = SamplerConfig(steps=3, eta=0.0, guidance_scale=2.0)
    expected = sampled(load(tmp_path / "folder"), sampler)
    torch.testing.assert_close(sampled(load(tmp_path, **config), sampler), expected)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_every_weight_of_a_single_file_arrives(part, tiny_pipeline_dir, tmp_path):
    file = tmp_path / "model.safetensors"
    original = StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir)
    write_original_layout(original, file)
    loaded = load_denoiser(ModelConfig(path=str(file), single_file_config=str(tiny_pipeline_dir), lora=None))
    found = getattr(loaded.pipeline, part).state_dict()
    for key, value in getattr(original, part).state_dict().items():
        torch.testing.assert_close(found[key], value, msg=key)


MISSING = {
    "model.diffusion_model.time_embed.0.weight": "lacks some of the weights",
    "first_stage_model.decoder.conv_in.bias": "lacks some of the weights",
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (
        r"the text_encoder lacks 1 of its weights: encoder.layers.0.mlp.fc1.weight"
    ),
}


def refusal(pipeline_dir: Path, file: Path, edit: Callable[[dict[str, Tensor]], object]) -> CheckpointError:
    write_original_layout(StableDiffusionPipeline.from_pretrained(pipeline_dir), file)
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as caught:
        load_denoiser(ModelConfig(path=str(file), single_file_config=str(pipeline_dir), lora=None))
    assert caught.value.where == str(file)
    return caught.value


@pytest.mark.parametrize(("name", "message"), MISSING.items(), ids=["unet", "vae", "text_encoder"])
def test_a_single_file_with_a_weight_missing_is_refused(name, message, tiny_pipeline_dir, tmp_path):
    error = refusal(tiny_pipeline_dir, tmp_path / "model.safetensors", lambda weights: weights.pop(name))
    assert re.search(message, error.what)
    assert "meta" not in str(error)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.diffusion_model.extra.weight", "unet"),
        ("model.diffusion_model.output_blocks.3.0.extra", "unet"),
        ("first_stage_model.decoder.extra.bias", "vae"),
    ],
)
def test_a_weight_of_a_single_file_that_is_left_over_is_named(name, part, tiny_pipeline_dir, tmp_path):
    file = tmp_path / "model.safetensors"
    error = refusal(tiny_pipeline_dir, file, lambda weights: weights.update({name: torch.ones(2)}))
    assert error.what == f"the {part} has 1 weights that its model has no place for: {name}"


def test_what_belongs_to_no_network_may_be_in_a_single_file(tiny_pipeline_dir, tmp_path):
    """Published ones hold noise levels, moving averages and more."""
    file = tmp_path / "model.safetensors"
    write_original_layout(StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir), file)
    others = {"alphas_cumprod": torch.ones(3), "model_ema.decay": torch.tensor(0.9)}
    save_file({**load_file(file), **others}, file)
    load_denoiser(ModelConfig(path=str(file), single_file_config=str(tiny_pipeline_dir), lora=None))


def test_a_single_file_whose_configuration_lacks_the_tokenizer_is_refused(tiny_pipeline_dir, tmp_path):
    config, file = shutil.copytree(tiny_pipeline_dir, tmp_path / "config"), tmp_path / "model.safetensors"
    shutil.rmtree(config / "tokenizer")
    write_original_layout(StableDiffusionPipeline.from_pretrained(tiny_pipeline_dir), file)
    with pytest.raises(CheckpointError, match="the tokenizer has no vocabulary"):
        load_denoiser(ModelConfig(path=str(file), single_file_config=str(config), lora=None))
