"""PixArt-Sigma (Chen et al. 2024, arXiv:2403.04692): T5 alone, and a transformer with a diffusion's noise levels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import diffusers
import torch
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin
from torch import Tensor

from diffalign.models.base import Conditioning
from diffalign.models.latent_diffusion import LatentDiffusion

T5_LENGTH = 300
"""Tokens of a prompt."""


class PixArtTransformer2DModel(diffusers.PixArtTransformer2DModel, PeftAdapterMixin):
    """diffusers' transformer with the methods for adapters that its other transformers have."""


class PixArtSigmaPipeline(diffusers.PixArtSigmaPipeline, SanaLoraLoaderMixin):
    """diffusers' pipeline, with a loader for LoRAs, which it lacks: the one of Sana knows a lone transformer."""

    def register_modules(self, **parts: Any) -> None:
        super().register_modules(**parts)
        if isinstance(parts.get("transformer"), diffusers.PixArtTransformer2DModel):
            # Only now: its own class is what model_index.json names.
            self.transformer.__class__ = PixArtTransformer2DModel


class PixArtSigma(LatentDiffusion):
    """A `PixArtSigmaPipeline` as a policy; see `DiffusersDenoiser`.

    A prompt is in small letters, as in training; its embeddings are T5's hidden states, and T5's mask of the padding
    goes with them. The network also predicts a variance, which is neither used nor trained. Where it takes the size of
    a picture, it is told it.
    """

    pipeline_class: ClassVar[Any] = PixArtSigmaPipeline
    network_name: ClassVar[str] = "transformer"
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    trained_encoders: ClassVar[tuple[str, ...]] = ()
    bfloat16_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        self._require_safe_vae()

    def _remember_side(self, side: int) -> None:
        """Left as it is: positions and size embeddings are built for the `sample_size` of the base model."""

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self._tokens("text_encoder", [text.lower().strip() for text in texts], T5_LENGTH)
        encoder = self.encoders["text_encoder"]
        states = encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        return {"embeddings": states, "mask": tokens.attention_mask}

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = x.to(self.network.dtype)
        with self._autocast():
            output = self.network(
                x,
                encoder_hidden_states=conditioning.embeddings.to(x.dtype),
                encoder_attention_mask=conditioning.extra["mask"],
                timestep=t,
                added_cond_kwargs=self._sizes(x),
            )
        prediction: Tensor = output.sample[:, : x.shape[1]].float()
        return prediction

    def _sizes(self, x: Tensor) -> dict[str, Tensor | None]:
        """Height and width in pixels [B, 2], and height / width [B, 1], of latents x, for a network that takes them."""
        if not self.network.use_additional_conditions:
            return {"resolution": None, "aspect_ratio": None}
        height, width = (cells * self._cell_side() for cells in x.shape[2:])
        resolution = torch.tensor([height, width], device=x.device, dtype=x.dtype)
        ratio = torch.tensor([height / width], device=x.device, dtype=x.dtype)
        return {"resolution": resolution.expand(len(x), 2), "aspect_ratio": ratio.expand(len(x), 1)}
