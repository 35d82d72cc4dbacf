"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, an autoencoder, a variance-preserving schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import StableDiffusionPipeline
from torch import Tensor

from diffalign.models.base import Conditioning
from diffalign.models.latent_diffusion import LatentDiffusion


class StableDiffusion(LatentDiffusion):
    """A `StableDiffusionPipeline` as a policy; see `DiffusersDenoiser`."""

    pipeline_class: ClassVar[Any] = StableDiffusionPipeline
    load_options: ClassVar[dict[str, object]] = {
        "safety_checker": None,
        "requires_safety_checker": False,
        "feature_extractor": None,
    }
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoder, tokens = self.encoders["text_encoder"], self._tokens("text_encoder", texts)
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", None) else None
        with self._autocast():
            return {"embeddings": encoder(tokens.input_ids, attention_mask=mask)[0]}

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = x.to(self.network.dtype)
        with self._autocast():
            output = self.network(x, t, encoder_hidden_states=conditioning.embeddings.to(x.dtype))
        return output.sample.float()
