"""Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952): two text encoders, and a UNet that is told the size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from diffalign.errors import CheckpointError
from diffalign.models.base import Conditioning
from diffalign.models.latent_diffusion import LatentDiffusion


class StableDiffusionXL(LatentDiffusion):
    """A `StableDiffusionXLPipeline` as a policy; see `DiffusersDenoiser`.

    A prompt's embeddings are the penultimate hidden states of both encoders side by side; the second one's pooled
    output goes with them. Original and target size are `size`, and nothing is cropped, unless `with_sizes` tells what
    pictures of a data set were.
    An empty prompt is zeros where the checkpoint says so (`force_zeros_for_empty_prompt`), in guidance as in training.
    """

    pipeline_class: ClassVar[Any] = StableDiffusionXLPipeline
    load_options: ClassVar[dict[str, object]] = {
        "image_encoder": None,
        "feature_extractor": None,
        "add_watermarker": False,
    }
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        if self.vae.config.get("latents_mean") is not None:
            raise CheckpointError(
                f"the latents of {self.config.path} are standardised by channel (latents_mean)",
                why="such a model (Playground v2.5) was trained with EDM's noise levels, not SDXL's",
                hint="give a checkpoint that was trained from SDXL base",
            )
        self._require_safe_vae()

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        states = []
        for name, encoder in self.encoders.items():
            with self._autocast():
                output = encoder(self._tokens(name, texts).input_ids, output_hidden_states=True)
            states.append(output.hidden_states[-2])
        rows = {"embeddings": torch.cat(states, dim=-1), "pooled": output.text_embeds}
        if self.pipeline.config.force_zeros_for_empty_prompt:
            given = torch.tensor([text != "" for text in texts], device=self.device)
            rows = {
                name: value * given.view(-1, *[1] * (value.ndim - 1)).to(value)
                for name, value in rows.items()
            }
        return rows

    def with_sizes(self, conditioning: Conditioning, sizes: Tensor | None) -> Conditioning:
        if sizes is None:
            return conditioning
        return replace(conditioning, extra={**conditioning.extra, "sizes": sizes.float().to(self.device)})

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = x.to(self.network.dtype)
        sizes = conditioning.extra.get("sizes")
        if sizes is None:
            height, width = map(float, self.size)
            sizes = torch.tensor([height, width, 0.0, 0.0, height, width], device=x.device).expand(len(x), 6)
        added = {"text_embeds": conditioning.extra["pooled"].to(x.dtype), "time_ids": sizes}
        with self._autocast():
            output = self.network(
                x, t, encoder_hidden_states=conditioning.embeddings.to(x.dtype), added_cond_kwargs=added
            )
        return output.sample.float()
