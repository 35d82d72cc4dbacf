"""Z-Image (Alibaba 2025, arXiv:2511.22699): a chat with Qwen 3, one stream of picture and prompt tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline
from torch import Tensor

from diffalign.models.base import Conditioning
from diffalign.models.latent_flow import LatentFlow

LENGTH = 512
"""Tokens of a prompt, its chat template included."""


class ZImage(LatentFlow):
    """A `ZImagePipeline` as a policy; see `DiffusersDenoiser`.

    A prompt is the one message of a chat; its embeddings are the penultimate hidden states of the chat's tokens,
    without the padding. The network counts time from noise to picture and predicts the velocity in that direction.

    The guidance scale is 1 + that of the pipeline, which adds g (cond - uncond) to cond: Z-Image-Turbo is sampled
    with 1.
    """

    pipeline_class: ClassVar[Any] = ZImagePipeline
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    trained_encoders: ClassVar[tuple[str, ...]] = ()
    bfloat16_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    samples_whole_range: ClassVar[bool] = True

    def _patch_side(self) -> int:
        return int(self.network.config.all_patch_size[0])

    def _default_side(self) -> int:
        return 128  # Z-Image was trained at 1024 pixels, which no part of its configuration says

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = self._tokenizer("text_encoder")
        chats = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for text in texts
        ]
        tokens = self._tokens("text_encoder", chats, LENGTH)
        mask = tokens.attention_mask.bool()
        output = self.encoders["text_encoder"](
            input_ids=tokens.input_ids, attention_mask=mask, output_hidden_states=True
        )
        return {"embeddings": output.hidden_states[-2], "mask": mask}

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = x.to(self.network.dtype)
        prompts = conditioning.embeddings.to(x.dtype)
        kept = [row[mask] for row, mask in zip(prompts, conditioning.extra["mask"], strict=True)]
        with self._autocast():
            output = self.network(
                list(x.unsqueeze(2).unbind()),
                1 - self._times(t) / self.schedule.num_timesteps,
                kept,
                patch_size=self._patch_side(),
            )
        return -torch.stack(list(output.sample)).squeeze(2).float()
