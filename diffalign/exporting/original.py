"""A pipeline's weights as one file in the layout of the original checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.exporting.kohya import clip_name
from diffalign.exporting.low_rank import flip
from diffalign.exporting.places import Places, flux_places, sd3_places, unet_places

NETWORK = "model.diffusion_model."
VAE = "first_stage_model."


def original_weights(family: str, pipeline: Any) -> dict[str, Tensor]:
    """Name -> tensor of a whole checkpoint (SD 1, 2, XL, 3), or of the transformer (FLUX.1, as its file has it).

    Args:
        family: the Denoiser's class.
        pipeline: with plain weights, adapters merged.

    Raises:
        ConfigError: a family whose original layout is not known, or weights that have no place in it.
    """
    require_original(family)
    return _LAYOUTS[family](pipeline)


def require_original(family: str) -> None:
    """Raises ConfigError for a family whose original layout is not known."""
    if family not in _LAYOUTS:
        raise ConfigError(
            f"--format single-file: the original layout of {family} is not known",
            why=f"it is written for {', '.join(_LAYOUTS)}",
            hint="use --format merged, which diffusers loads",
        )


def network_weights(weights: Mapping[str, Tensor], places: Places) -> dict[str, Tensor]:
    """The tensors of a denoising network by their original names."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, value in weights.items():
        if name == "pos_embed.pos_embed":
            parts["pos_embed"] = {0: value}
            continue
        module, _, kind = name.rpartition(".")
        place = places(module)
        kind = "scale" if place.name.endswith(("query_norm", "key_norm")) else kind
        tensor = flip(value) if place.flipped else value
        parts.setdefault(f"{place.name}.{kind}", {})[place.part] = tensor
    return {name: _joined([found[part] for part in sorted(found)]) for name, found in parts.items()}


_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def vae_weights(vae: Any) -> dict[str, Tensor]:
    """The tensors of an AutoencoderKL by their original names; its attention is of 1x1 convolutions there."""
    last = len(vae.config.block_out_channels) - 1
    return dict(_vae_entry(name, value, last) for name, value in vae.state_dict().items())


def _vae_entry(name: str, value: Tensor, last: int) -> tuple[str, Tensor]:
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    if match := re.fullmatch(r"(\w+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
        name = f"{match[1]}.mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
        return name, value[:, :, None, None] if value.ndim == 2 else value
    name = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{last - int(m[1])}.block", name)
    return re.sub(
        r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{last - int(m[1])}.upsample", name
    ), value


def clip_weights(encoder: Any) -> dict[str, Tensor]:
    """The tensors of a CLIP text encoder by the names of transformers before 5.6."""
    return {
        clip_name(name): value
        for name, value in encoder.state_dict().items()
        if not name.endswith("position_ids")
    }


_OPEN_CLIP = (
    ("text_model.encoder.layers.", "transformer.resblocks."),
    ("text_model.embeddings.token_embedding", "token_embedding"),
    ("text_model.final_layer_norm", "ln_final"),
    ("layer_norm", "ln_"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def open_clip_weights(encoder: Any) -> dict[str, Tensor]:
    """The tensors of a CLIP text encoder by OpenCLIP's names: q, k and v are one, the projection is transposed."""
    found: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for name, value in clip_weights(encoder).items():
        if name == "text_model.embeddings.position_embedding.weight":
            found["positional_embedding"] = value
        elif name == "text_projection.weight":
            found["text_projection"] = value.T
        elif match := re.fullmatch(r".*\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            fused = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            projections.setdefault(fused, {})[match[2]] = value
        else:
            for ours, theirs in _OPEN_CLIP:
                name = name.replace(ours, theirs)
            found[name] = value
    return found | {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in projections.items()}


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _prefixed(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights.items()}


def _stable_diffusion(pipeline: Any) -> dict[str, Tensor]:
    unet, encoder = pipeline.unet, pipeline.text_encoder
    if encoder.config.hidden_act == "quick_gelu":  # SD 1: OpenAI's CLIP; SD 2: OpenCLIP
        text = _prefixed("cond_stage_model.transformer.", clip_weights(encoder))
    else:
        text = _prefixed("cond_stage_model.model.", open_clip_weights(encoder))
    network = network_weights(unet.state_dict(), unet_places(unet))
    return _prefixed(NETWORK, network) | _prefixed(VAE, vae_weights(pipeline.vae)) | text


def _stable_diffusion_xl(pipeline: Any) -> dict[str, Tensor]:
    unet = pipeline.unet
    return {
        **_prefixed(NETWORK, network_weights(unet.state_dict(), unet_places(unet))),
        **_prefixed(VAE, vae_weights(pipeline.vae)),
        **_prefixed("conditioner.embedders.0.transformer.", clip_weights(pipeline.text_encoder)),
        **_prefixed("conditioner.embedders.1.model.", open_clip_weights(pipeline.text_encoder_2)),
    }


def _stable_diffusion_3(pipeline: Any) -> dict[str, Tensor]:
    transformer = pipeline.transformer
    first = clip_weights(pipeline.text_encoder)
    projection = first.pop("text_projection.weight")
    if not torch.equal(projection, torch.eye(len(projection), dtype=projection.dtype)):
        raise ConfigError(
            "--format single-file: the projection of this pipeline's first text encoder has no place in the layout",
            why="readers take it for the identity, which it is in Stability's own checkpoints",
            hint="use --format merged",
        )
    found = {
        **_prefixed(NETWORK, network_weights(transformer.state_dict(), sd3_places(transformer))),
        **_prefixed(VAE, vae_weights(pipeline.vae)),
        **_prefixed("text_encoders.clip_l.transformer.", first),
        **_prefixed("text_encoders.clip_g.transformer.", clip_weights(pipeline.text_encoder_2)),
    }
    if pipeline.text_encoder_3 is not None:
        found |= _prefixed("text_encoders.t5xxl.transformer.", pipeline.text_encoder_3.state_dict())
    return found


def _flux(pipeline: Any) -> dict[str, Tensor]:
    transformer = pipeline.transformer
    return network_weights(transformer.state_dict(), flux_places(transformer))


_LAYOUTS: dict[str, Callable[[Any], dict[str, Tensor]]] = {
    "StableDiffusion": _stable_diffusion,
    "StableDiffusionXL": _stable_diffusion_xl,
    "StableDiffusion3": _stable_diffusion_3,
    "Flux": _flux,
}
