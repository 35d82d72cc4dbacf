"""Sana (Xie et al. 2024, arXiv:2410.10629): Gemma with an instruction, linear attention, an autoencoder by 32."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline
from torch import Tensor

from diffalign.errors import CheckpointError
from diffalign.models.base import Conditioning
from diffalign.models.latent_flow import LatentFlow

LENGTH = 300
"""Tokens of a prompt that the network is given."""
INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)
"""What Gemma reads before a prompt: the pipeline's own default."""


class Sana(LatentFlow):
    """A `SanaPipeline` as a policy; see `DiffusersDenoiser`.

    Gemma reads `INSTRUCTION` and the prompt in small letters. Of its hidden states, the network is given the first and
    the last 299, with the mask of the padding. The empty prompt is read without the instruction, as the pipeline's
    negative prompt is.

    The autoencoder is deterministic: a latent is no mean of a distribution.
    """

    pipeline_class: ClassVar[Any] = SanaPipeline
    encoder_names: ClassVar[tuple[str, ...]] = ("text_encoder",)
    trained_encoders: ClassVar[tuple[str, ...]] = ()
    bfloat16_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    samples_whole_range: ClassVar[bool] = False

    def _check_pipeline(self) -> None:
        super()._check_pipeline()
        if self.network.config.guidance_embeds:
            raise CheckpointError(
                f"the network of {self.config.path} takes the guidance scale as an input",
                why="it is a Sana-Sprint, distilled for one to four steps of another kind of sampling",
                hint="give a Sana of SanaPipeline, such as Efficient-Large-Model/Sana_1600M_1024px_diffusers",
            )

    def _cell_side(self) -> int:
        return int(2 ** (len(self.vae.config.encoder_block_out_channels) - 1))

    def _remember_side(self, side: int) -> None:
        """Left as it is: where the network has positions, they are built for the `sample_size` of the base model."""

    def _encoded(self, pixels: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(pixels).latent
        return latents

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        tokenizer = self._tokenizer("text_encoder")
        tokenizer.padding_side = "right"
        length = len(tokenizer.encode(INSTRUCTION)) + LENGTH - 2
        read = [INSTRUCTION + text.lower().strip() if text else "" for text in texts]
        tokens = self._tokens("text_encoder", read, length)
        states = self.encoders["text_encoder"](tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        first, last = list(range(LENGTH)), [0, *range(length - LENGTH + 1, length)]
        columns = torch.tensor([last if text else first for text in texts], device=states.device)
        rows = torch.arange(len(texts), device=states.device)[:, None]
        return {"embeddings": states[rows, columns], "mask": tokens.attention_mask[rows, columns]}

    def _forward(self, x: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        x = x.to(self.network.dtype)
        with self._autocast():
            output = self.network(
                x,
                encoder_hidden_states=conditioning.embeddings.to(x.dtype),
                encoder_attention_mask=conditioning.extra["mask"],
                timestep=self._times(t) * self.network.config.timestep_scale,
            )
        prediction: Tensor = output.sample[:, : x.shape[1]].float()
        return prediction
