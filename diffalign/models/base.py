"""`Denoiser`: what the optimizers need from a diffusion model, and nothing of its family.

Latents are NCHW and scaled to about unit variance; pictures are NCHW float32 in [0, 1]; timesteps are int64 [B].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.config import SamplerConfig
from diffalign.config.sizes import Size
from diffalign.schedule import ForwardProcess
from diffalign.transitions import Sampler


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, and what the network is given where there is no prompt.

    Args:
        embeddings: [B, L, C], one row per prompt.
        unconditional: [1, L, C], no prompt, for classifier-free guidance.
        extra: name -> [B, ...], whatever else a family tells its network (pooled embeddings, picture sizes).
        unconditional_extra: the same names -> [1, ...]; without what is not of a prompt (sizes), which stays as it is.
    """

    embeddings: Tensor
    unconditional: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    unconditional_extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.embeddings)

    def __getitem__(self, rows: Tensor | slice) -> Conditioning:
        """The prompts at `rows` (an index tensor or a slice)."""
        extra = {name: value[rows] for name, value in self.extra.items()}
        return replace(self, embeddings=self.embeddings[rows], extra=extra)

    def after_unconditional(self) -> Conditioning:
        """2B rows for one guided pass: "no prompt" B times, then the B prompts."""
        without = self.unconditional_extra
        extra = {name: _below(without.get(name, value), value) for name, value in self.extra.items()}
        return replace(self, embeddings=_below(self.unconditional, self.embeddings), extra=extra)


def _below(one: Tensor, many: Tensor) -> Tensor:
    return torch.cat([one.expand_as(many), many])


class Denoiser(ABC):
    """A diffusion model: a policy over denoising steps, with its frozen reference.

    Attributes:
        schedule: noise levels and parameterisation.
        device: where the networks live.
        size: height and width in pixels of the pictures that are sampled, and trained on without buckets.
        latent_shape: (C, H, W) of one latent.
        trains_text_encoder: prompts must be encoded inside the loss, with gradients.
    """

    schedule: ForwardProcess
    device: torch.device
    size: Size
    latent_shape: tuple[int, int, int]
    trains_text_encoder: bool

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode B prompts; too long ones are truncated before the end token."""

    @abstractmethod
    def predict(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        """The network's output for x [B, C, H, W] at t [B], guided: uncond + w (cond - uncond). Float32.

        Condition and no-condition go through the network in one pass; w = 1 skips the latter.
        """

    def with_sizes(self, conditioning: Conditioning, sizes: Tensor | None) -> Conditioning:
        """`conditioning` with what its pictures were before they were cropped, for a family that is told.

        Args:
            sizes: [B, 6] pixels, see `data.buckets.told`; None: as sampled, from pictures of the size they have.
        """
        return conditioning

    def require_size(self, size: Size, option: str) -> None:
        """Raise ConfigError, which names `option`, for pictures of a size that the model cannot take."""
        return

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Posterior means of pictures [B, 3, H, W] in [0, 1], as scaled float32 latents."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] float32 in [0, 1] from scaled latents. Differentiable up to the final clamp."""

    @abstractmethod
    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Name -> float32 parameter, in a fixed order."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Within it, `predict` and `encode_prompts` are the frozen reference policy's."""

    @abstractmethod
    def make_sampler(self, config: SamplerConfig) -> Sampler:
        """Timesteps as diffusers' own scheduler spaces them for this checkpoint."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write what plain diffusers loads: LoRA weights, or a whole pipeline after full fine-tuning."""

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of everything that pictures depend on: weights, tokenizer, schedule."""

    @abstractmethod
    def prepare_training(self, *, gradient_checkpointing: bool, compile: bool) -> None:
        """Switch on what only training needs."""
