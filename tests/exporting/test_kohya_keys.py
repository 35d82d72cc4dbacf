"""kohya's names of the full-size architectures, against rules written by hand and the numbers of modules that
sd-scripts prints for them (SD 1.5: 192 and 72, SDXL: 722, 72 and 192, FLUX.1: 304). Built on the meta device.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from diffusers import (
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffalign.errors import ConfigError
from diffalign.exporting.kohya import KOHYA, clip_name, original_updates, require_kohya
from diffalign.models.lora import adaptable_layers
from diffalign.models.lora_updates import Update

ATTENTION = ["attn1_to_q", "attn1_to_k", "attn1_to_v", "attn1_to_out_0"]
ATTENTION += [name.replace("attn1", "attn2") for name in ATTENTION]
OF_TRANSFORMER = [*ATTENTION, "ff_net_0_proj", "ff_net_2"]


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def updates_for(network: Any, pattern: str) -> dict[str, Update]:
    """Rank one, for every layer whose name has `pattern` in it."""
    return {
        name: Update(torch.zeros(1, 1), torch.zeros(len(layer.weight), 1), 1.0)
        for name, layer in adaptable_layers(network).items()
        if re.search(pattern, name)
    }


def kohya_names(family: str, network: Any, pattern: str) -> list[str]:
    placed = original_updates(network, updates_for(network, pattern), KOHYA[family].places(network))
    return sorted(f"lora_unet_{name.replace('.', '_')}" for name in placed)


def transformers_at(places: dict[str, int]) -> list[str]:
    """Place of a transformer in a UNet -> its depth, as all names of its layers."""
    return sorted(
        f"lora_unet_{place}_{layer}"
        for place, depth in places.items()
        for layer in ["proj_in", "proj_out"]
        + [f"transformer_blocks_{i}_{name}" for i in range(depth) for name in OF_TRANSFORMER]
    )


def test_stable_diffusion_1_5():
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    places = {f"down_blocks_{b}_attentions_{i}": 1 for b in (0, 1, 2) for i in (0, 1)}
    places |= {f"up_blocks_{b}_attentions_{i}": 1 for b in (1, 2, 3) for i in (0, 1, 2)}
    expected = transformers_at({**places, "mid_block_attentions_0": 1})
    assert kohya_names("StableDiffusion", unet, "attentions") == expected
    assert len(expected) == 192


def test_sdxl():
    with torch.device("meta"):
        unet = sdxl_unet()
    depths = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    depths |= {"middle_block_1": 10, **{f"output_blocks_{i}_1": 10 for i in (0, 1, 2)}}
    expected = transformers_at({**depths, **{f"output_blocks_{i}_1": 2 for i in (3, 4, 5)}})
    found = kohya_names("StableDiffusionXL", unet, "attentions")
    assert found == expected
    assert len(expected) == 722
    attention = [name for name in found if "_attn" in name]
    file = {f"{name}.lora_{side}.weight": torch.zeros(1, 1) for name in attention for side in ("down", "up")}
    read, _ = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=unet.config)
    modules = {re.sub(r"_lora\.(down|up)\.weight$", "", key).replace(".processor", "") for key in read}
    layers = [name for name in adaptable_layers(unet) if re.search(r"attn[12]", name)]
    assert modules == {f"unet.{name.removesuffix('.0')}" for name in layers}


def test_every_layer_of_the_unet_of_sdxl_has_a_name_of_its_own():
    with torch.device("meta"):
        unet = sdxl_unet()
    found = kohya_names("StableDiffusionXL", unet, "")
    assert len(set(found)) == len(adaptable_layers(unet))
    for name in (
        *("input_blocks_0_0", "input_blocks_1_0_in_layers_2", "input_blocks_3_0_op", "time_embed_0"),
        *("input_blocks_4_0_skip_connection", "middle_block_2_emb_layers_1", "output_blocks_2_2_conv"),
        *("output_blocks_5_2_conv", "output_blocks_8_0_out_layers_3", "label_emb_0_2", "out_2"),
    ):
        assert f"lora_unet_{name}" in found


@pytest.mark.parametrize(("kind", "depth"), [(CLIPTextModel, 12), (CLIPTextModelWithProjection, 32)])
def test_text_encoders(kind: type, depth: int):
    with torch.device("meta"):
        encoder = kind(CLIPTextConfig(num_hidden_layers=depth))
    layers = [name for name in adaptable_layers(encoder) if "text_projection" not in name]
    projections = [f"self_attn_{part}_proj" for part in ("q", "k", "v", "out")]
    expected = {
        f"text_model_encoder_layers_{i}_{layer}"
        for i in range(depth)
        for layer in [*projections, "mlp_fc1", "mlp_fc2"]
    }
    assert {clip_name(name).replace(".", "_") for name in layers} == expected
    assert len(layers) == 6 * depth  # 72 and 192


def test_prefixes():
    assert KOHYA["StableDiffusion"].encoders == {"text_encoder": "lora_te"}
    for family in ("StableDiffusionXL", "StableDiffusion3"):
        assert KOHYA[family].encoders == {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    assert KOHYA["Flux"].encoders == {"text_encoder": "lora_te1"}


def test_flux():
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    sides = ["attn_qkv", "attn_proj", "mlp_0", "mlp_2", "mod_lin"]
    expected = [
        f"lora_unet_double_blocks_{i}_{side}_{layer}"
        for i in range(19)
        for side in ("img", "txt")
        for layer in sides
    ]
    expected += [
        f"lora_unet_single_blocks_{i}_{layer}"
        for i in range(38)
        for layer in ("linear1", "linear2", "modulation_lin")
    ]
    assert kohya_names("Flux", transformer, "transformer_blocks") == sorted(expected)
    assert len(expected) == 304


def test_stable_diffusion_3_5_medium():
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    layers = ["attn_qkv", "attn_proj", "mlp_fc1", "mlp_fc2", "adaLN_modulation_1"]
    expected = {
        f"lora_unet_joint_blocks_{i}_{side}_block_{layer}"
        for i in range(24)
        for side in ("x", "context")
        for layer in layers
    }
    expected |= {
        f"lora_unet_joint_blocks_{i}_x_block_attn2_{name}" for i in range(13) for name in ("qkv", "proj")
    }
    unused = ("attn_proj", "mlp_fc1", "mlp_fc2")  # the last block's prompt has no output
    expected -= {f"lora_unet_joint_blocks_23_context_block_{layer}" for layer in unused}
    assert kohya_names("StableDiffusion3", transformer, r"^transformer_blocks") == sorted(expected)


def test_a_family_without_kohya_names_is_refused():
    with pytest.raises(ConfigError, match="names of PixArtSigma are not known"):
        require_kohya("PixArtSigma")
