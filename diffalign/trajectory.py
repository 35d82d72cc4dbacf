"""Denoising trajectories: sampled step by step, stored, and scored again under a changed policy.

The order inside a step matters: round x_prev to the storage type first, then take its log-probability, so that
what replay scores is bit for bit what rollout scored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.models.base import Conditioning, Denoiser
from diffalign.seeding import sample_noise
from diffalign.transitions import GaussianStep, Sampler


@dataclass(frozen=True)
class Transition:
    """One denoising step of a batch.

    Args:
        index: position in the sampler; t, t_prev: timesteps.
        x, x_prev: [B, C, H, W] in the storage type, before and after.
        mean: [B, C, H, W] float32, of the Gaussian that x_prev was drawn from.
        log_prob: [B] float32, mean over latent elements; None where the step is deterministic.
    """

    index: int
    t: int
    t_prev: int
    x: Tensor
    x_prev: Tensor
    mean: Tensor
    log_prob: Tensor | None


@torch.no_grad()
def rollout(
    denoiser: Denoiser,
    conditioning: Conditioning,
    sampler: Sampler,
    seeds: Sequence[int],
    *,
    storage_dtype: torch.dtype = torch.float32,
) -> Iterator[Transition]:
    """Sample B trajectories, yielding each step as it is done.

    Args:
        conditioning: B encoded prompts.
        seeds: B ints; trajectory i depends on its prompt and seeds[i] only, not on its batch.
        storage_dtype: the type latents are kept, and continued from, in.
    """
    stochastic = set(sampler.stochastic_steps())
    x = sample_noise(denoiser.latent_shape, seeds, "initial").to(denoiser.device).to(storage_dtype)
    for index, (t, t_prev) in enumerate(sampler.pairs()):
        times = torch.full((len(x),), t, device=denoiser.device)
        prediction = denoiser.predict(x, times, conditioning, sampler.guidance_scale)
        step = sampler.step(x, prediction, times, torch.full_like(times, t_prev))
        log_prob = None
        if index in stochastic:
            noise = sample_noise(denoiser.latent_shape, seeds, "step", index).to(denoiser.device)
            x_prev = step.sample(noise).to(storage_dtype)
            log_prob = step.log_prob(x_prev)
        else:
            x_prev = step.mean.to(storage_dtype)
        yield Transition(index, t, t_prev, x, x_prev, step.mean, log_prob)
        x = x_prev


@dataclass(frozen=True)
class Trajectory:
    """N denoising steps of B samples.

    Args:
        sampler: the kernel and timesteps they were sampled with.
        latents: [N + 1, B, C, H, W] in the storage type, noise first, picture last.
        log_probs: [N, B] float32, means over latent elements; NaN at deterministic steps.
        means: [N, B, C, H, W] float32, of the steps' Gaussians, where they were kept.
    """

    sampler: Sampler
    latents: Tensor
    log_probs: Tensor
    means: Tensor | None = None

    @classmethod
    def collect(
        cls, sampler: Sampler, transitions: Iterator[Transition], *, keep_means: bool = False
    ) -> Trajectory:
        """Run a rollout to its end and keep it."""
        latents: list[Tensor] = []
        means: list[Tensor] = []
        log_probs: list[Tensor] = []
        for step in transitions:
            if not latents:
                latents.append(step.x)
            latents.append(step.x_prev)
            if keep_means:
                means.append(step.mean)
            missing = torch.full((len(step.x),), torch.nan, device=step.x.device)
            log_probs.append(missing if step.log_prob is None else step.log_prob)
        return cls(
            sampler, torch.stack(latents), torch.stack(log_probs), torch.stack(means) if means else None
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Join batches sampled with one sampler."""
        return cls(
            parts[0].sampler,
            torch.cat([part.latents for part in parts], dim=1),
            torch.cat([part.log_probs for part in parts], dim=1),
            None
            if parts[0].means is None
            else torch.cat([part.means for part in parts if part.means is not None], dim=1),
        )

    @property
    def final(self) -> Tensor:
        """The finished latents, [B, C, H, W] in the storage type."""
        return self.latents[-1]

    def __len__(self) -> int:
        return self.latents.shape[1]

    def replay(
        self, denoiser: Denoiser, conditioning: Conditioning, samples: Tensor, steps: Tensor
    ) -> GaussianStep:
        """Stored steps under the present policy, with gradients: the Gaussians of K steps.

        Args:
            conditioning: K encoded prompts, those of `samples`.
            samples, steps: [K] indices; any (sample, step) pairs, in any batch size.
        """
        device = self.latents.device
        samples, steps = samples.to(device), steps.to(device)
        x = self.latents[steps, samples]
        t = self.sampler.timesteps.to(device)[steps]
        t_prev = self.sampler.previous.to(device)[steps]
        prediction = denoiser.predict(x, t, conditioning, self.sampler.guidance_scale)
        return self.sampler.step(x, prediction, t, t_prev)

    def log_ratio(
        self, step: GaussianStep, samples: Tensor, steps: Tensor, *, normalized: bool = False
    ) -> Tensor:
        """log(present policy / sampling policy) of the K stored steps whose Gaussians `replay` gave: [K] float32.

        Args:
            normalized: `GaussianStep.normalized_log_ratio`, which needs `means`.

        Raises:
            ValueError: a step is deterministic, or `means` were not kept.
        """
        device = self.latents.device
        samples, steps = samples.to(device), steps.to(device)
        x_prev = self.latents[steps + 1, samples]
        if not normalized:
            return step.log_prob(x_prev) - self.log_probs[steps, samples]
        if self.means is None:
            raise ValueError("a normalised ratio needs the means of the rollout: collect(keep_means=True)")
        return step.normalized_log_ratio(self.means[steps, samples], x_prev)
