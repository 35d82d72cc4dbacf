"""The original layouts, against diffusers' converters and the rule by which ComfyUI finds a LoRA's layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_pipeline
from diffusers import FluxPipeline, FluxTransformer2DModel, StableDiffusionPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from families import tiny_flux, tiny_sd3
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPTextModel

from diffalign.config import LoRAConfig
from diffalign.errors import ConfigError
from diffalign.exporting.kohya import kohya_weights, original_updates
from diffalign.exporting.original import network_weights, original_weights, require_original
from diffalign.exporting.places import flux_places, sd3_places
from diffalign.models.lora import TRAINED, add_lora, lora_layers
from diffalign.models.lora_updates import Update, updates_of

FLUX_WIDTH = 3072
"""diffusers' converters of FLUX.1 know no other."""


def narrow_flux() -> tuple[FluxTransformer2DModel, dict[str, Tensor]]:
    """One block of each kind at full width, on the meta device; and its weights with one column each."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    draw = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(len(value), *[1] * (value.ndim - 1), generator=draw)
        for name, value in transformer.state_dict().items()
    }
    return transformer, weights


def test_the_flux_converter_of_diffusers_undoes_the_layout():
    transformer, weights = narrow_flux()
    original = network_weights(weights, flux_places(transformer))
    found = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


def test_the_sd3_converter_of_diffusers_undoes_the_layout():
    transformer = tiny_sd3(t5=False).transformer
    weights = transformer.state_dict()
    original = network_weights(weights, sd3_places(transformer))
    found = convert_sd3_transformer_checkpoint_to_diffusers(dict(original))
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "proj_mlp"), ("to_q", "to_v")])
def test_diffusers_reads_the_kohya_layers_of_flux(targets: tuple[str, ...]):
    transformer, weights = narrow_flux()
    draw = torch.Generator().manual_seed(0)
    updates = {}
    for name, value in weights.items():
        module = name.removesuffix(".weight")
        if module.endswith(("to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", *targets)):
            sides = [torch.randn(shape, generator=draw) for shape in [(2, FLUX_WIDTH), (len(value), 2)]]
            updates[module] = Update(sides[0], sides[1], 2.5)
    file: dict[str, Tensor] = {}
    for module, update in original_updates(transformer, updates, flux_places(transformer)).items():
        name = f"lora_unet_{module.replace('.', '_')}"
        file |= {f"{name}.lora_down.weight": update.down, f"{name}.lora_up.weight": update.up}
        file[f"{name}.alpha"] = torch.tensor(update.scale * update.rank)
    found = FluxPipeline.lora_state_dict(file)
    for module, update in updates.items():
        down, up = (found[f"transformer.{module}.lora_{side}.weight"] for side in "AB")
        probe = torch.randn(FLUX_WIDTH, 1, generator=draw)
        assert_close(up @ (down @ probe), 2.5 * (update.up @ (update.down @ probe)), rtol=1e-4, atol=1e-2)
    others = {key.removeprefix("transformer.").split(".lora_")[0] for key in found} - updates.keys()
    for module in others:  # of a fused layer: nothing is added to them
        assert not found[f"transformer.{module}.lora_B.weight"].any()


def with_adapters(transformer: Any) -> Any:
    add_lora(transformer, LoRAConfig(rank=2, alpha=5.0), [".*"], seed=0)
    draw = torch.Generator().manual_seed(0)
    for layer in lora_layers(transformer):
        up = layer.lora_B[TRAINED].weight
        up.data = torch.randn(up.shape, generator=draw)
    return transformer


@pytest.mark.parametrize(
    ("family", "build", "places"),
    [("StableDiffusion3", tiny_sd3, sd3_places), ("Flux", tiny_flux, flux_places)],
)
def test_kohya_layers_belong_to_the_original_weights_of_their_name(family: str, build: Any, places: Any):
    """As ComfyUI does: `lora_unet_` and the name of a weight, dots as underscores."""
    transformer = build().transformer
    weights = network_weights(transformer.state_dict(), places(transformer))
    transformer = with_adapters(transformer)
    updates = {"transformer": updates_of(transformer, TRAINED)}
    file, sizes = kohya_weights(family, updates, {"transformer": transformer})
    assert sizes == {(2, 5.0)}
    for name in [name for name in weights if name.endswith(".weight")]:
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{key}.alpha" in file:
            down, up = file.pop(f"{key}.lora_down.weight"), file.pop(f"{key}.lora_up.weight")
            scale = file.pop(f"{key}.alpha") / len(down)
            change = scale * up.flatten(1) @ down.flatten(1)
            weights[name] = weights[name] + change.view(weights[name].shape)
    assert not file
    for layer in lora_layers(transformer):
        layer.merge()
    merged = {
        name.replace(".base_layer", ""): value
        for name, value in transformer.state_dict().items()
        if ".lora_" not in name
    }
    for name, value in network_weights(merged, places(transformer)).items():
        assert_close(weights[name], value, msg=name)


def test_stable_diffusion_2_has_the_text_encoder_of_open_clip(tmp_path: Path):
    pipeline = tiny_pipeline()
    config = pipeline.text_encoder.config
    config.hidden_act = "gelu"
    pipeline.text_encoder = CLIPTextModel(config)
    pipeline.save_pretrained(tmp_path / "folder")
    tensors = original_weights("StableDiffusion", pipeline)
    assert "cond_stage_model.model.transformer.resblocks.1.attn.in_proj_weight" in tensors
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "sd2.safetensors")
    loaded = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "sd2.safetensors"), config=str(tmp_path / "folder"), local_files_only=True
    )
    for part in ("unet", "vae", "text_encoder"):
        found = getattr(loaded, part).state_dict()
        for name, value in getattr(pipeline, part).state_dict().items():
            assert torch.equal(found[name], value), name


def test_what_the_layout_has_no_place_for_is_refused():
    with pytest.raises(ConfigError, match="projection of this pipeline's first text encoder"):
        original_weights("StableDiffusion3", tiny_sd3(t5=False))
    with pytest.raises(ConfigError, match="original layout of Sana is not known"):
        require_original("Sana")
