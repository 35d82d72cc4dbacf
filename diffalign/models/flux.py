"""FLUX.1 (Black Forest Labs 2024): T5 and a pooled CLIP, a transformer over packed latents, a shift by resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline
from torch import Tensor

from diffalign.errors import ConfigError
from diffalign.models.base import Conditioning, Denoiser
from diffalign.models.latent_flow import LatentFlow

PACK = 2
"""Latent cells along the side of one token."""


class Flux(LatentFlow):
    """A `FluxPipeline` as a policy; see `DiffusersDenoiser`.

    Outside, latents are [B, 16, H, W] as everywhere; the network's tokens are packed in `predict`. A prompt's
    embeddings are T5's hidden states, its pooled vector is CLIP's.

    A network that takes the guidance scale as an input (FLUX.1 [dev], `guidance_embeds`) is given it, in one pass, 1
    included; any other ([schnell]) is guided by two predictions, as in the other families.
    """

    pipeline_class: ClassVar[Any] = FluxPipeline
    load_options: ClassVar[dict[str, object]] = {"image_encoder": None, "feature_extractor": None}
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    bfloat16_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_2",)
    t5_name: ClassVar[str] = "text_encoder_2"
    t5_length: ClassVar[int] = 512
    samples_whole_range: ClassVar[bool] = True

    @property
    def takes_guidance(self) -> bool:
        """The network was distilled from guided predictions, and the scale is one of its inputs."""
        return bool(self.network.config.guidance_embeds)

    def _network_channels(self) -> int:
        return int(self.network.config.in_channels) // PACK**2

    def _patch_side(self) -> int:
        return PACK

    def _default_side(self) -> int:
        return 128  # FLUX.1 was trained at 1024 pixels, which no part of its configuration says

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        with self._autocast():
            output = self.encoders["text_encoder"](self._tokens("text_encoder", texts).input_ids)
        pooled = output.pooler_output
        return {"embeddings": self._encode_t5(list(texts)).to(pooled), "pooled": pooled}

    def predict(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        if not self.takes_guidance:
            return super().predict(x, t, conditioning, guidance_scale)
        return self._predict(x, t.to(self.device).expand(len(x)), conditioning, guidance_scale)

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return self._predict(x, t, conditioning, None)

    def _predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance: float | None) -> Tensor:
        tokens = pack(x.to(self.network.dtype))
        scale = None if guidance is None else torch.full((len(x),), guidance, device=x.device)
        with self._autocast():
            output = self.network(
                hidden_states=tokens,
                timestep=self._times(t) / 1000,  # the network multiplies by 1000
                guidance=scale,
                pooled_projections=conditioning.extra["pooled"].to(tokens.dtype),
                encoder_hidden_states=conditioning.embeddings.to(tokens.dtype),
                txt_ids=torch.zeros(conditioning.embeddings.shape[1], 3, device=x.device),
                img_ids=positions(x.shape[2] // PACK, x.shape[3] // PACK, x.device),
            )
        return unpack(output.sample.float(), x.shape[2], x.shape[3])

    def guide_away_from(self, negative: Denoiser) -> None:
        if self.takes_guidance:
            raise ConfigError(
                "a guidance-distilled network takes no negative model",
                why="its guidance happens inside of one prediction",
                hint="leave --negative out",
            )
        super().guide_away_from(negative)


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> tokens [B, H/2 * W/2, 4 C], row by row; a token is a 2 x 2 square, channel by channel."""
    batch, channels, height, width = latents.shape
    squares = latents.reshape(batch, channels, height // PACK, PACK, width // PACK, PACK)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * PACK**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """`pack` undone: tokens [B, H/2 * W/2, 4 C] -> [B, C, H, W]."""
    batch, _, size = tokens.shape
    squares = tokens.reshape(batch, height // PACK, width // PACK, size // PACK**2, PACK, PACK)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Of each token, row by row: (0, row, column), float32 [rows * columns, 3]."""
    grid = torch.zeros(rows, columns, 3, device=device)
    grid[..., 1] = torch.arange(rows, device=device)[:, None]
    grid[..., 2] = torch.arange(columns, device=device)
    return grid.view(-1, 3)
