"""The forward process: x_t = alpha_t x_0 + sigma_t eps, and what a network may predict about it.

Two numbers per timestep describe variance-preserving diffusion, so losses and samplers never ask which
checkpoint they work on. Imports torch only; a checkpoint's own betas arrive as `alphas_cumprod`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample"]


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels of a diffusion model and its parameterisation.

    Args:
        alphas_cumprod: [T] abar_t = alpha_t^2, decreasing in t, in (0, 1); the last may be 0 (zero-terminal SNR).
        prediction_type: what the network outputs: eps, v = alpha eps - sigma x_0 (Salimans & Ho 2022), or x_0.
        final_alpha_cumprod: abar used for "before timestep 0" (diffusers' `set_alpha_to_one`: 1, else abar_0).

    Raises:
        ValueError: the table is not a [T] tensor of decreasing values in [0, 1), or the type is unknown.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType = "epsilon"
    final_alpha_cumprod: float = 1.0

    def __post_init__(self) -> None:
        table = self.alphas_cumprod
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must be a [T] tensor, got shape {tuple(table.shape)}")
        if not (table.min() >= 0 and table.max() < 1 and (table.diff() < 0).all()):
            raise ValueError("alphas_cumprod must decrease strictly from below 1 to 0 or more")
        if self.prediction_type not in get_args(PredictionType):
            raise ValueError(
                f"unknown prediction type {self.prediction_type!r}; known: {get_args(PredictionType)}"
            )
        if self.prediction_type == "epsilon" and table[-1] == 0:
            raise ValueError("epsilon-prediction cannot recover x_0 at zero terminal SNR; use v_prediction")
        object.__setattr__(self, "alphas_cumprod", table.detach().to("cpu", torch.float64))

    @property
    def num_timesteps(self) -> int:
        """T; timesteps are 0 .. T-1, larger is noisier."""
        return len(self.alphas_cumprod)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """abar at timesteps t (any shape), float64 on t's device; t < 0 gives `final_alpha_cumprod`."""
        table = self.alphas_cumprod.to(t.device)
        return torch.where(t < 0, self.final_alpha_cumprod, table[t.clamp_min(0).long()])

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for t [B] (or a scalar), float32, shaped to broadcast over `like` [B, ...]."""
        abar = self.alpha_bar(t.to(like.device))
        shape = (-1,) + (1,) * (like.ndim - 1)
        return abar.sqrt().float().view(shape), (1 - abar).sqrt().float().view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2 for t [B], float32."""
        abar = self.alpha_bar(t)
        return (abar / (1 - abar)).float()

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] from x_0 and eps of that shape, at t [B]; float32."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for x_t: eps, v or x_0, float32 [B, ...]."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return x0.float()
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise.float() - sigma * x0.float()

    def to_x0_eps(self, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Split x_t into the predicted x_0 and eps, both float32 [B, ...].

        The result satisfies x_t = alpha_t x_0 + sigma_t eps for every parameterisation.
        """
        x, prediction = x.float(), prediction.float()
        alpha, sigma = self.alpha_sigma(t, x)
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        if self.prediction_type == "sample":
            return prediction, (x - alpha * prediction) / sigma
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x
