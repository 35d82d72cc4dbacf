"""Where the original layouts of Stable Diffusion, SD 3 and FLUX.1 keep each module of diffusers' networks.

The names are facts of the published checkpoints; diffusers' single-file loaders are the other direction, and the tests
run them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Place:
    """A module of an original network, or the rows of one."""

    name: str
    part: int = 0
    """Position among the modules that are fused into it, row by row."""
    flipped: bool = False
    """The two halves of the rows are in the other order (shift and scale)."""


Places = Callable[[str], Place]
"""diffusers' name of a module (no `.weight`) -> where it is."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_IN_UNET_BLOCK = re.compile(
    r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
)


def unet_places(unet: Any) -> Places:
    """Of Stable Diffusion 1, 2 and XL: blocks are counted through, resnet first, then attention, then resampling."""
    layers = unet.config.layers_per_block
    depth = len(unet.config.down_block_types)
    layers = [layers] * depth if isinstance(layers, int) else list(layers)
    first_down = [1 + sum(count + 1 for count in layers[:block]) for block in range(depth)]
    first_up = [sum(count + 1 for count in layers[::-1][:block]) for block in range(depth)]
    attends = [hasattr(block, "attentions") for block in unet.up_blocks]

    def find(module: str) -> Place:
        if module in _UNET:
            return Place(_UNET[module])
        match = _IN_UNET_BLOCK.fullmatch(module)
        if match is None:
            raise KeyError(module)
        way, block, kind, index, rest = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
        if kind == "resnets":
            rest = _RESNET[rest]
        if way == "mid":
            return Place(f"middle_block.{2 * index + (kind == 'attentions')}.{rest}")
        if kind == "downsamplers":
            return Place(f"input_blocks.{first_down[block] + layers[block]}.0.op")
        if kind == "upsamplers":
            last = first_up[block] + layers[::-1][block]
            return Place(f"output_blocks.{last}.{1 + attends[block]}.{rest}")
        side, first = ("input", first_down) if way == "down" else ("output", first_up)
        return Place(f"{side}_blocks.{first[block] + index}.{int(kind == 'attentions')}.{rest}")

    return find


def _fused(target: str, modules: Sequence[str]) -> dict[str, Place]:
    return {module: Place(target, part) for part, module in enumerate(modules)}


def _renamed(names: Mapping[str, str]) -> dict[str, Place]:
    return {module: Place(name) for module, name in names.items()}


_QKV, _ADDED_QKV = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")

_SD3_BLOCK = {
    **_fused("x_block.attn.qkv", [f"attn.{name}" for name in _QKV]),
    **_fused("context_block.attn.qkv", [f"attn.{name}" for name in _ADDED_QKV]),
    **_fused("x_block.attn2.qkv", [f"attn2.{name}" for name in _QKV]),
    **_renamed(
        {
            "attn.to_out.0": "x_block.attn.proj",
            "attn.to_add_out": "context_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "attn.norm_q": "x_block.attn.ln_q",
            "attn.norm_k": "x_block.attn.ln_k",
            "attn.norm_added_q": "context_block.attn.ln_q",
            "attn.norm_added_k": "context_block.attn.ln_k",
            "attn2.norm_q": "x_block.attn2.ln_q",
            "attn2.norm_k": "x_block.attn2.ln_k",
            "norm1.linear": "x_block.adaLN_modulation.1",
            "norm1_context.linear": "context_block.adaLN_modulation.1",
            "ff.net.0.proj": "x_block.mlp.fc1",
            "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1",
            "ff_context.net.2": "context_block.mlp.fc2",
        }
    ),
}
_SD3 = {
    **_renamed(
        {
            "pos_embed.proj": "x_embedder.proj",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "context_embedder": "context_embedder",
            "proj_out": "final_layer.linear",
        }
    ),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", flipped=True),
}


def sd3_places(transformer: Any) -> Places:
    """Of Stable Diffusion 3 and 3.5. The last block's prompt side has no output; its shift and scale are flipped."""
    last = transformer.config.num_layers - 1

    def find(module: str) -> Place:
        if module in _SD3:
            return _SD3[module]
        _, number, inside = module.split(".", 2)
        place = _SD3_BLOCK[inside]
        flipped = inside == "norm1_context.linear" and int(number) == last
        return replace(place, name=f"joint_blocks.{number}.{place.name}", flipped=flipped)

    return find


_FLUX_DOUBLE = {
    **_fused("img_attn.qkv", [f"attn.{name}" for name in _QKV]),
    **_fused("txt_attn.qkv", [f"attn.{name}" for name in _ADDED_QKV]),
    **_renamed(
        {
            "attn.to_out.0": "img_attn.proj",
            "attn.to_add_out": "txt_attn.proj",
            "attn.norm_q": "img_attn.norm.query_norm",
            "attn.norm_k": "img_attn.norm.key_norm",
            "attn.norm_added_q": "txt_attn.norm.query_norm",
            "attn.norm_added_k": "txt_attn.norm.key_norm",
            "norm1.linear": "img_mod.lin",
            "norm1_context.linear": "txt_mod.lin",
            "ff.net.0.proj": "img_mlp.0",
            "ff.net.2": "img_mlp.2",
            "ff_context.net.0.proj": "txt_mlp.0",
            "ff_context.net.2": "txt_mlp.2",
        }
    ),
}
_FLUX_SINGLE = {
    **_fused("linear1", [*(f"attn.{name}" for name in _QKV), "proj_mlp"]),
    **_renamed(
        {
            "proj_out": "linear2",
            "norm.linear": "modulation.lin",
            "attn.norm_q": "norm.query_norm",
            "attn.norm_k": "norm.key_norm",
        }
    ),
}
_FLUX = {
    **_renamed(
        {
            "x_embedder": "img_in",
            "context_embedder": "txt_in",
            "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
            "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
            "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
            "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
            "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
            "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
            "proj_out": "final_layer.linear",
        }
    ),
    "norm_out.linear": Place("final_layer.adaLN_modulation.1", flipped=True),
}


def flux_places(transformer: Any) -> Places:
    """Of FLUX.1."""

    def find(module: str) -> Place:
        if module in _FLUX:
            return _FLUX[module]
        blocks, number, inside = module.split(".", 2)
        is_single = blocks == "single_transformer_blocks"
        place = (_FLUX_SINGLE if is_single else _FLUX_DOUBLE)[inside]
        return replace(place, name=f"{'single' if is_single else 'double'}_blocks.{number}.{place.name}")

    return find
