"""The forward process: x_t = alpha_t x_0 + sigma_t eps, and what a network may predict about it.

Two numbers per timestep describe variance-preserving diffusion and rectified flow alike, so losses and samplers never
ask which checkpoint they work on. Imports torch only; a checkpoint's own betas arrive as `alphas_cumprod`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "sample", "flow"]
VARIANCE_PRESERVING = ("epsilon", "v_prediction", "sample")


class ForwardProcess(ABC):
    """What losses and samplers know of the noise levels and the parameterisation of a model.

    A timestep is a number t = 0 .. `num_timesteps` - 1, larger is noisier; -1 stands for "before timestep 0". Drawing t
    uniformly is the model's own training distribution. A flow takes the times between them as well (`FlowSchedule`).
    """

    @property
    @abstractmethod
    def prediction_type(self) -> PredictionType:
        """What the network outputs."""

    @property
    @abstractmethod
    def num_timesteps(self) -> int:
        """T; timesteps are 0 .. T-1, larger is noisier."""

    @abstractmethod
    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at t (any shape), float64 on t's device."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network should output for x_t, float32 [B, ...]."""

    @abstractmethod
    def to_x0_eps(self, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Split x_t into the predicted x_0 and eps, both float32 [B, ...].

        The result satisfies x_t = alpha_t x_0 + sigma_t eps for every parameterisation.
        """

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for t [B] (or a scalar), float32, shaped to broadcast over `like` [B, ...]."""
        alpha, sigma = self.levels(t.to(like.device))
        shape = (-1,) + (1,) * (like.ndim - 1)
        return alpha.float().view(shape), sigma.float().view(shape)

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2 for t [B], float32."""
        alpha, sigma = self.levels(t)
        return (alpha / sigma).square().float()

    def same_levels(self, other: ForwardProcess) -> bool:
        """Whether both have the same timesteps, and the same alpha and sigma at each, to 1e-6."""
        if self.num_timesteps != other.num_timesteps:
            return False
        t = torch.arange(-1, self.num_timesteps)
        ours, theirs = self.levels(t), other.levels(t)
        return all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(ours, theirs, strict=True))

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """x_t [B, ...] from x_0 and eps of that shape, at t [B]; float32."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0.float() + sigma * noise.float()


@dataclass(frozen=True)
class NoiseSchedule(ForwardProcess):
    """Variance-preserving diffusion: alpha_t^2 + sigma_t^2 = 1.

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
        if self.prediction_type not in VARIANCE_PRESERVING:
            raise ValueError(
                f"unknown prediction type {self.prediction_type!r}; known: {VARIANCE_PRESERVING}"
            )
        if self.prediction_type == "epsilon" and table[-1] == 0:
            raise ValueError("epsilon-prediction cannot recover x_0 at zero terminal SNR; use v_prediction")
        object.__setattr__(self, "alphas_cumprod", table.detach().to("cpu", torch.float64))

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    def alpha_bar(self, t: Tensor) -> Tensor:
        """abar at timesteps t (any shape), float64 on t's device; t < 0 gives `final_alpha_cumprod`."""
        table = self.alphas_cumprod.to(t.device)
        return torch.where(t < 0, self.final_alpha_cumprod, table[t.clamp_min(0).long()])

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        abar = self.alpha_bar(t)
        return abar.sqrt(), (1 - abar).sqrt()

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """eps, v or x_0."""
        if self.prediction_type == "epsilon":
            return noise.float()
        if self.prediction_type == "sample":
            return x0.float()
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise.float() - sigma * x0.float()

    def to_x0_eps(self, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, prediction = x.float(), prediction.float()
        alpha, sigma = self.alpha_sigma(t, x)
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha, prediction
        if self.prediction_type == "sample":
            return prediction, (x - alpha * prediction) / sigma
        return alpha * x - sigma * prediction, alpha * prediction + sigma * x


@dataclass(frozen=True)
class FlowSchedule(ForwardProcess):
    """Rectified flow: alpha = 1 - s, sigma = s, the network predicts v = eps - x_0 (Liu et al. 2022, arXiv:2209.03003).

    A timestep is either of two things, told apart by the tensor's type:

    - an integer index 0 .. T-1, as training draws it: s = shift u / (1 + (shift - 1) u) with u = (t + 1) / T, the
      levels that diffusers' FlowMatchEulerDiscreteScheduler is trained on; -1 is the picture, s = 0;
    - a floating-point time T s in [0, T], as samplers hold it and as the network is given it.

    Args:
        num_timesteps: T, the scale of the network's time (1000 for every published model).
        shift: how much of training and sampling is spent at high noise (Esser et al. 2024, arXiv:2403.03206, eq. 23);
            1 is uniform. A shift that depends on the resolution is exp(mu) of diffusers' dynamic shifting.

    Raises:
        ValueError: fewer than two timesteps, or a shift that is not positive.
    """

    num_timesteps: int = 1000
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.num_timesteps < 2 or not self.shift > 0:
            raise ValueError(
                f"a flow needs two timesteps or more and a positive shift, "
                f"not {self.num_timesteps} and {self.shift}"
            )

    @property
    def prediction_type(self) -> PredictionType:
        return "flow"

    def level(self, t: Tensor) -> Tensor:
        """s in [0, 1] at indices or times t (any shape), float64 on t's device."""
        if t.is_floating_point():
            return t.double() / self.num_timesteps
        share = (t + 1).double() / self.num_timesteps
        return self.shift * share / (1 + (self.shift - 1) * share)

    def levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        level = self.level(t)
        return 1 - level, level

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v = eps - x_0, at every t."""
        return noise.float() - x0.float()

    def to_x0_eps(self, x: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, velocity = x.float(), prediction.float()
        alpha, sigma = self.alpha_sigma(t, x)
        return x - sigma * velocity, x + alpha * velocity
