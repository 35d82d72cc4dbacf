"""Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206): two CLIPs, T5 if it is there, joint attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor
from torch.nn.functional import pad

from diffalign.config.sizes import Size
from diffalign.errors import ConfigError
from diffalign.models.base import Conditioning
from diffalign.models.latent_flow import LatentFlow


class StableDiffusion3(LatentFlow):
    """A `StableDiffusion3Pipeline` as a policy; see `DiffusersDenoiser`.

    A prompt's embeddings are the CLIPs' penultimate hidden states side by side, then T5's hidden states, or zeros where
    the checkpoint has no T5. Both pooled outputs go with them.
    """

    pipeline_class: ClassVar[Any] = StableDiffusion3Pipeline
    load_options: ClassVar[dict[str, object]] = {"image_encoder": None, "feature_extractor": None}
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    optional_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    trained_encoders: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    bfloat16_encoders: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    t5_name: ClassVar[str] = "text_encoder_3"
    t5_length: ClassVar[int] = 256
    samples_whole_range: ClassVar[bool] = False

    def require_size(self, size: Size, option: str) -> None:
        super().require_size(size, option)
        patch, most = self._cell_side() * self._patch_side(), self.network.config.pos_embed_max_size
        if most and max(size) > most * patch:
            raise ConfigError(
                f"{option}: {max(size)} is more than this checkpoint has positions for",
                why=f"{size[0] // patch} x {size[1] // patch} patches, and it knows {most} x {most}",
                hint=f"at most {most * patch}",
            )

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        length = self._tokenizer("text_encoder").model_max_length
        states, pooled = [], []
        for name in self.trained_encoders:
            with self._autocast():
                output = self.encoders[name](
                    self._tokens(name, texts, length).input_ids, output_hidden_states=True
                )
            states.append(output.hidden_states[-2])
            pooled.append(output.text_embeds)
        clip = torch.cat(states, dim=-1)
        width = int(self.network.config.joint_attention_dim)
        if self.t5_name in self.encoders:
            t5 = self._encode_t5(list(texts)).to(clip)
        else:
            t5 = clip.new_zeros(len(texts), self.t5_length, width)
        joint = torch.cat([pad(clip, (0, width - clip.shape[-1])), t5], dim=1)
        return {"embeddings": joint, "pooled": torch.cat(pooled, dim=-1)}

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = x.to(self.network.dtype)
        with self._autocast():
            output = self.network(
                hidden_states=x,
                timestep=self._times(t),
                encoder_hidden_states=conditioning.embeddings.to(x.dtype),
                pooled_projections=conditioning.extra["pooled"].to(x.dtype),
            )
        return output.sample.float()
