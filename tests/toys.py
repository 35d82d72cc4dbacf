"""A policy whose optimum can be worked out by hand: Gaussian data with one trainable number, its mean.

The data are N(mu, SPREAD^2), alike for every latent element and prompt. The network's answer is exact,

    eps_hat = sigma (x - alpha mu) / (alpha^2 SPREAD^2 + sigma^2),

so every denoising step is linear in x and mu: a finished latent has mean `gain(sampler)` mu, and a step's KL to the
reference (mu = 0) is `kl_coefficients(sampler)[step]` mu^2, whatever x is. Pictures are latents / 20 + 1/2, so that
`latent_reward` (the mean latent element, times a slope) is linear and differentiable up to |latent| = 10.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.config import SamplerConfig
from diffalign.models.base import Conditioning, Denoiser
from diffalign.schedule import NoiseSchedule
from diffalign.transitions import Sampler

SPREAD = 0.5
SCALE = 20.0


class ToyDenoiser(Denoiser):
    """See the module. `mean` [1] is the only parameter; `calls` counts rows given to `predict`."""

    def __init__(self, mean: float = 0.0, timesteps: int = 100) -> None:
        # Noise levels of DDPM's linear betas, coarser: abar falls from 0.999 to about 5e-3.
        betas = torch.linspace(1e-3, 0.1, timesteps, dtype=torch.float64)
        self.schedule = NoiseSchedule((1 - betas).cumprod(0), final_alpha_cumprod=0.9995)
        self.device = torch.device("cpu")
        self.size, self.latent_shape, self.trains_text_encoder = (2, 2), (1, 2, 2), False
        self.mean = nn.Parameter(torch.tensor([mean]))
        self._is_reference, self.calls = False, 0

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.zeros(len(prompts), 1, 1), torch.zeros(1, 1, 1))

    def predict(
        self, x: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Tensor:
        self.calls += len(x)
        alpha, sigma = self.schedule.alpha_sigma(t, x)
        mean = torch.zeros(1) if self._is_reference else self.mean
        return sigma * (x.float() - alpha * mean) / (alpha**2 * SPREAD**2 + sigma**2)

    def encode_images(self, images: Tensor) -> Tensor:
        return SCALE * (images.mean(dim=1, keepdim=True) - 0.5)

    def decode(self, latents: Tensor) -> Tensor:
        return (latents / SCALE + 0.5).expand(-1, 3, -1, -1).clamp(0, 1)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {"mean": self.mean}

    @contextmanager
    def reference(self) -> Iterator[None]:
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False

    def make_sampler(self, config: SamplerConfig) -> Sampler:
        total = self.schedule.num_timesteps
        timesteps = (
            torch.arange(config.steps - 1, -1, -1) * (total // config.steps) + total // config.steps - 1
        )
        previous = torch.cat([timesteps[1:], torch.tensor([-1])])
        return Sampler(self.schedule, timesteps, previous, config.kind, config.eta, config.guidance_scale)

    def export(self, folder: Path) -> None:
        raise NotImplementedError

    def fingerprint(self) -> str:
        return f"toy {float(self.mean.detach())}"

    def prepare_training(self, *, gradient_checkpointing: bool, compile: bool) -> None:
        pass


def latent_reward(images: Tensor, slope: float = 1.0) -> Tensor:
    """slope x mean latent element [B], of pictures [B, 3, H, W]."""
    return slope * SCALE * (images - 0.5).flatten(1).mean(dim=1)


def _shifts(sampler: Sampler) -> list[tuple[float, float, float]]:
    """(what x is multiplied by, what mu is multiplied by, std) of each step: x_prev = a x + b mu + std noise."""
    found = []
    one, zero = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    for t, previous in sampler.pairs():
        times, before = torch.tensor([t]), torch.tensor([previous])

        def mean(x: Tensor, mu: float, times: Tensor = times, before: Tensor = before) -> float:
            toy = ToyDenoiser(mu, sampler.schedule.num_timesteps)
            prediction = toy.predict(x, times, toy.encode_prompts([""]))
            return float(sampler.step(x, prediction.detach(), times, before).mean[0, 0, 0, 0])

        std = float(sampler.step(zero, zero, times, before).std)
        found.append((mean(one, 0.0), mean(zero, 1.0), std))
    return found


def gain(sampler: Sampler) -> float:
    """d E[finished latent] / d mu."""
    total = 0.0
    for a, b, _ in _shifts(sampler):
        total = a * total + b
    return total


def final_variance(sampler: Sampler) -> float:
    """Variance of a finished latent's element, which does not depend on mu."""
    variance = 1.0
    for a, _, std in _shifts(sampler):
        variance = a**2 * variance + std**2
    return variance


def kl_coefficients(sampler: Sampler) -> list[float]:
    """KL(policy || reference) of each step / mu^2, averaged over latent elements; inf at deterministic steps."""
    return [b**2 / (2 * std**2) if std else float("inf") for _, b, std in _shifts(sampler)]
