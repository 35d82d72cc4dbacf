"""One denoising step as a Gaussian: x_prev ~ N(mean, std^2).

Every quantity that policy gradients need (a sample, a log-probability, a KL, an importance ratio) is a
question to `GaussianStep`. Kernels are pure functions of (x_t, prediction, t, t_prev); `Sampler` holds a
whole list of timesteps. All arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.schedule import NoiseSchedule


@dataclass(frozen=True)
class GaussianStep:
    """The distribution of x_prev given x_t.

    Args:
        mean: [B, C, H, W] float32.
        std: [B, 1, 1, 1] float32, equal for all latent elements of a sample; 0 is a deterministic step.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with standard normal `noise` of the mean's shape."""
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, x_prev: Tensor) -> Tensor:
        """Log-density of x_prev [B, C, H, W], *averaged* over latent elements: [B], nats per element.

        The joint log-density is this times C*H*W. Clip ranges such as 1e-4 refer to the mean (ddpo-pytorch).

        Raises:
            ValueError: a step is deterministic (std = 0) and has no density.
        """
        if not bool((self.std > 0).all()):
            raise ValueError("a deterministic step (std = 0) has no log-probability; sample with eta > 0")
        z = (x_prev.float() - self.mean) / self.std
        log_density = -0.5 * z.square() - self.std.log() - 0.5 * math.log(2 * math.pi)
        return log_density.flatten(1).mean(dim=1)

    def normalized_log_ratio(self, old_mean: Tensor, x_prev: Tensor) -> Tensor:
        """log(new / old), re-centred and re-scaled so that every timestep is weighed and clipped alike: [B].

            (log_prob_new - log_prob_old + mean((mu - mu_old)^2) / (2 std^2)) std = mean(z (mu - mu_old))

        with z = (x_prev - mu_old) / std the noise that was drawn (GRPO-Guard's ratio normalisation, whose
        gradient no longer grows as 1 / std towards the picture).
        """
        z = (x_prev.float() - old_mean.float()) / self.std
        return (z * (self.mean - old_mean.float())).flatten(1).mean(dim=1)

    def kl(self, other: GaussianStep) -> Tensor:
        """KL(self || other), averaged over latent elements: [B], nats per element; equal stds required."""
        if not torch.equal(self.std, other.std):
            raise ValueError("KL between steps is defined here for equal stds (same sampler, same timestep)")
        return 0.5 * ((self.mean - other.mean) / self.std).square().flatten(1).mean(dim=1)


def _abar(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    return schedule.alpha_bar(t.to(like.device)).view((-1,) + (1,) * (like.ndim - 1))


def ddim_step(
    schedule: NoiseSchedule, x: Tensor, prediction: Tensor, t: Tensor, t_prev: Tensor, *, eta: float
) -> GaussianStep:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16).

        std  = eta sqrt((1 - abar_s) / (1 - abar_t)) sqrt(1 - abar_t / abar_s)
        mean = sqrt(abar_s) x0_hat + sqrt(1 - abar_s - std^2) eps_hat          (s = t_prev)

    Args:
        x, prediction: [B, C, H, W]; t, t_prev: [B], t_prev = -1 stands for "before timestep 0".
        eta: 0 deterministic, 1 as noisy as DDPM.
    """
    x0, eps = schedule.to_x0_eps(x, prediction, t)
    abar_t, abar_s = _abar(schedule, t, x), _abar(schedule, t_prev, x)
    variance = eta**2 * (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    direction = (1 - abar_s - variance).clamp_min(0).sqrt()
    return GaussianStep(abar_s.sqrt().float() * x0 + direction.float() * eps, variance.sqrt().float())


def ddpm_step(
    schedule: NoiseSchedule, x: Tensor, prediction: Tensor, t: Tensor, t_prev: Tensor
) -> GaussianStep:
    """DDPM ancestral step with the small posterior variance (Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7).

        mean = sqrt(abar_s) beta / (1 - abar_t) x0_hat + sqrt(alpha) (1 - abar_s) / (1 - abar_t) x_t
        var  = (1 - abar_s) / (1 - abar_t) beta,    alpha = abar_t / abar_s, beta = 1 - alpha

    Shapes as in `ddim_step`. The last step (t_prev < 0) has abar_s = 1 and is deterministic.
    """
    x0, _ = schedule.to_x0_eps(x, prediction, t)
    abar_t = _abar(schedule, t, x)
    abar_s = torch.where((t_prev < 0).to(x.device).view_as(abar_t), 1.0, _abar(schedule, t_prev, x))
    alpha = abar_t / abar_s
    x0_weight = abar_s.sqrt() * (1 - alpha) / (1 - abar_t)
    x_weight = alpha.sqrt() * (1 - abar_s) / (1 - abar_t)
    variance = (1 - abar_s) / (1 - abar_t) * (1 - alpha)
    return GaussianStep(x0_weight.float() * x0 + x_weight.float() * x.float(), variance.sqrt().float())


@dataclass(frozen=True)
class Sampler:
    """A kernel and its timesteps, noisiest first.

    Args:
        schedule: noise levels and parameterisation.
        timesteps: [N] decreasing ints; `previous` [N] the timestep each step leads to (-1: none left).
        kind: "ddim" or "ddpm"; eta: DDIM's noise scale.
        guidance_scale: classifier-free guidance weight used with every prediction.
    """

    schedule: NoiseSchedule
    timesteps: Tensor
    previous: Tensor
    kind: Literal["ddim", "ddpm"] = "ddim"
    eta: float = 0.0
    guidance_scale: float = 1.0

    def __len__(self) -> int:
        return len(self.timesteps)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(t, t_prev) of each step in sampling order."""
        return zip(self.timesteps.tolist(), self.previous.tolist(), strict=True)

    def step(self, x: Tensor, prediction: Tensor, t: Tensor, t_prev: Tensor) -> GaussianStep:
        """The Gaussian of x_prev for x [B, C, H, W] at t [B]; samples may sit at different timesteps."""
        if self.kind == "ddpm":
            return ddpm_step(self.schedule, x, prediction, t, t_prev)
        return ddim_step(self.schedule, x, prediction, t, t_prev, eta=self.eta)

    def stochastic_steps(self) -> list[int]:
        """Indices of the steps that have a density (std > 0), so that a policy gradient exists.

        The last step of DDPM, and of DDIM with `set_alpha_to_one`, is deterministic.
        """
        like = torch.zeros(len(self), 1, 1, 1)
        std = self.step(like, like, self.timesteps, self.previous).std.flatten()
        return [index for index, value in enumerate(std.tolist()) if value > 0]
