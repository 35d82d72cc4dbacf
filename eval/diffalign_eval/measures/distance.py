"""How far an aligned checkpoint has moved from its base: KL along the trajectory, and drift of the denoising error.

Both take two `Denoiser`s and work in batches; what is kept grows by a few numbers a picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from diffalign.config import SamplerConfig
from diffalign.config.sizes import Size
from diffalign.errors import CheckpointError, ConfigError, DataError, NumericsError
from diffalign.images import resize_crop, to_tensor
from diffalign.losses.denoising import squared_error
from diffalign.models.base import Denoiser
from diffalign.seeding import sample_noise
from diffalign.trajectory import rollout
from diffalign.transitions import GaussianStep, Sampler
from diffalign_eval.statistics import Interval, mean_interval, paired_difference

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Fractions of the last timestep at which denoising errors are measured."""

# --- KL along the trajectory --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrajectoryKL:
    """KL of the aligned policy's trajectories from the base's."""

    nats: tuple[float, ...]
    """Of each picture: summed over steps and latent elements."""
    prompts: tuple[str, ...]
    """Of each picture."""
    by_timestep: dict[int, float]
    """Timestep -> mean over pictures, nats; the values sum to the mean of `nats`."""
    elements: int
    """Latent elements of a picture, C * H * W."""

    def interval(self) -> Interval:
        """Mean nats per picture; prompts are resampled."""
        return mean_interval(self.nats, self.prompts)

    def per_element(self) -> Interval:
        """Mean nats per latent element, which compares models of different resolution."""
        return mean_interval([value / self.elements for value in self.nats], self.prompts)


def stochastic(sampler: SamplerConfig) -> SamplerConfig:
    """The sampler with the noise that a KL between trajectories needs: DDIM at eta = 1, a flow's SDE for its ODE."""
    if sampler.kind == "ddim":
        return sampler.model_copy(update={"eta": 1.0})
    return sampler.model_copy(update={"kind": "flow_sde"}) if sampler.kind == "euler" else sampler


@torch.no_grad()
def trajectory_kl(
    policy: Denoiser,
    base: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    batch_size: int = 8,
) -> TrajectoryKL:
    """KL(policy || base) between the distributions of whole denoising trajectories, by sampling the policy.

        KL = E_policy sum_t KL(N(mu_policy, std_t^2) || N(mu_base, std_t^2)) = E sum_t |mu_p - mu_b|^2 / (2 std_t^2)

    The chain rule of KL for Markov chains with one initial distribution; what KL-regularised RL of diffusion
    models penalises (Fan et al. 2023, DPOK, arXiv:2305.16381). It bounds the KL between the pictures'
    distributions from above. Steps without noise have no density and are left out.

    Args:
        policy, base: the aligned checkpoint and what it was trained from, on any devices.
        prompts, seeds: N each; a picture depends on its own prompt and seed only.
        sampler: with noise (`stochastic`); the guidance scale is that of both.
        batch_size: pictures per denoiser call; changes memory and speed only.

    Raises:
        ConfigError: a sampler without noise. CheckpointError: the two do not share latents and noise schedule.
        NumericsError: a KL that is not finite (the prompt is named).
        ValueError: no prompts, or another number of seeds.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"prompts and seeds are pairs, got {len(prompts)} and {len(seeds)}")
    steps, base_steps = policy.make_sampler(sampler), base.make_sampler(sampler)
    _require_one_process(policy, base, steps, base_steps)
    noisy = steps.stochastic_steps()
    if not noisy:
        raise ConfigError(
            "KL along the trajectory needs a sampler with noise",
            why=f"{sampler.kind} with eta = {sampler.eta} is deterministic: its steps have no density",
            hint="eta = 1 samples both checkpoints with noise for this measurement",
        )
    batches = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        kls = _step_kls(policy, base, prompts[rows], seeds[rows], steps, base_steps)
        _require_finite(kls, prompts[rows])
        batches.append(kls)
    kls = torch.cat(batches, dim=1)
    times = [int(steps.timesteps[index]) for index in noisy]
    return TrajectoryKL(
        nats=tuple(kls.sum(dim=0).tolist()),
        prompts=tuple(prompts),
        by_timestep=dict(zip(times, kls.mean(dim=1).tolist(), strict=True)),
        elements=torch.Size(policy.latent_shape).numel(),
    )


def _step_kls(
    policy: Denoiser,
    base: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: Sampler,
    base_steps: Sampler,
) -> Tensor:
    """Nats [noisy steps, B], float64 on the CPU, of one batch."""
    conditioning = base.encode_prompts(prompts)
    kls = []
    for move in rollout(policy, policy.encode_prompts(prompts), steps, seeds):
        if move.log_prob is None:
            continue
        x = move.x.to(base.device)
        times = torch.full((len(x),), move.t, device=base.device)
        prediction = base.predict(x, times, conditioning, base_steps.guidance_scale)
        reference = base_steps.step(x, prediction, times, torch.full_like(times, move.t_prev))
        mean_kl = GaussianStep(move.mean.to(base.device), reference.std).kl(reference)
        kls.append(mean_kl.double().cpu() * move.x[0].numel())
    return torch.stack(kls)


def _require_one_process(policy: Denoiser, base: Denoiser, steps: Sampler, base_steps: Sampler) -> None:
    _require_one_latent_space(policy, base)
    if not (
        policy.schedule.same_levels(base.schedule)
        and torch.equal(steps.timesteps, base_steps.timesteps)
        and torch.equal(steps.previous, base_steps.previous)
    ):
        raise CheckpointError(
            "the checkpoints have different noise schedules",
            why="their denoising steps then differ in variance, and the KL between them says nothing of training",
            hint="measure a checkpoint against the base that it was trained from",
        )


def _require_one_latent_space(policy: Denoiser, base: Denoiser) -> None:
    if policy.latent_shape != base.latent_shape:
        raise CheckpointError(
            "the checkpoints have latents of different shapes",
            why=f"{list(policy.latent_shape)} and {list(base.latent_shape)}",
            hint="measure a checkpoint against the base that it was trained from, at one resolution",
        )


def _require_finite(values: Tensor, texts: Sequence[str]) -> None:
    """Raises NumericsError, with its text, for the first picture of [.., B] with a value that is not finite."""
    bad = (~torch.isfinite(values)).any(dim=0).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            "the distance between the checkpoints is not finite",
            where=f"prompt {texts[bad[0]]!r}",
            hint="one of the two predicts NaN or infinity; try float32 (mixed_precision: no)",
        )


# --- drift of the denoising error ---------------------------------------------------------------------------


@dataclass(frozen=True)
class DenoisingDrift:
    """Denoising errors of policy and base on the same pictures, noise and timesteps."""

    policy: tuple[float, ...]
    """Of each picture: mean squared error over timesteps and latent elements."""
    base: tuple[float, ...]
    captions: tuple[str, ...]
    by_timestep: dict[int, float]
    """Timestep -> mean over pictures of policy - base."""

    def interval(self) -> Interval:
        """Mean of policy - base; captions are resampled. Above 0: the policy denoises these pictures worse."""
        return paired_difference(self.base, self.policy, self.captions)

    @property
    def relative(self) -> float:
        """The drift as a share of the base's own error: 0.05 is an error 5 % higher."""
        return sum(self.policy) / sum(self.base) - 1


@torch.no_grad()
def denoising_drift(
    policy: Denoiser,
    base: Denoiser,
    batches: Iterable[tuple[Sequence[Image.Image], Sequence[str]]],
    *,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    seed: int = 0,
) -> DenoisingDrift:
    """Policy's minus base's denoising error (Ho et al. 2020, arXiv:2006.11239, eq. 14), without guidance.

    Args:
        policy, base: the aligned checkpoint and what it was trained from.
        batches: pictures and their captions, as many of each, one batch a denoiser call; of any sizes (the
            centre is resized). Real pictures, or the base's own samples.
        noise_levels: fractions of the last timestep, 0 to 1.
        seed: of the noise, a function of (seed, position of the picture, timestep).

    Raises:
        CheckpointError: the two differ in latents, noise schedule or what they predict.
        DataError: no pictures. NumericsError: an error that is not finite (the caption is named).
    """
    _require_one_target(policy, base)
    times = [round(level * (base.schedule.num_timesteps - 1)) for level in noise_levels]
    errors: list[Tensor] = []
    captions: list[str] = []
    for pictures, texts in batches:
        rows = range(len(captions), len(captions) + len(pictures))
        pixels = to_tensor([_fit(picture, base.size) for picture in pictures])
        batch = _errors(policy, base, base.encode_images(pixels), texts, times, (seed, rows))
        _require_finite(batch.flatten(0, 1), texts)
        errors.append(batch)
        captions += texts
    if not errors:
        raise DataError("no pictures to measure the denoising error on")
    ours, theirs = torch.cat(errors, dim=2)
    return DenoisingDrift(
        policy=tuple(ours.mean(dim=0).tolist()),
        base=tuple(theirs.mean(dim=0).tolist()),
        captions=tuple(captions),
        by_timestep=dict(zip(times, (ours - theirs).mean(dim=1).tolist(), strict=True)),
    )


def _errors(
    policy: Denoiser,
    base: Denoiser,
    x0: Tensor,
    captions: Sequence[str],
    times: Sequence[int],
    noise: tuple[int, Sequence[int]],
) -> Tensor:
    """[2, T, B] float64 on the CPU: policy's and base's errors on latents x0 [B, C, H, W]."""
    seed, rows = noise
    both = []
    for denoiser in (policy, base):
        conditioning = denoiser.encode_prompts(captions)
        latents, schedule = x0.to(denoiser.device), denoiser.schedule
        errors = []
        for time in times:
            eps = sample_noise(denoiser.latent_shape, rows, "drift", seed, time).to(denoiser.device)
            t = torch.full((len(latents),), time, device=denoiser.device)
            prediction = denoiser.predict(schedule.add_noise(latents, eps, t), t, conditioning)
            errors.append(squared_error(prediction, schedule.target(latents, eps, t)).double().cpu())
        both.append(torch.stack(errors))
    return torch.stack(both)


def _require_one_target(policy: Denoiser, base: Denoiser) -> None:
    _require_one_latent_space(policy, base)
    ours, theirs = policy.schedule, base.schedule
    if not ours.same_levels(theirs) or ours.prediction_type != theirs.prediction_type:
        raise CheckpointError(
            "the checkpoints have different denoising errors",
            why=f"their noise schedules differ, or what they predict: {ours.prediction_type} and "
            f"{theirs.prediction_type}",
            hint="measure a checkpoint against the base that it was trained from",
        )


def _fit(picture: Image.Image, size: Size) -> Image.Image:
    return picture if (picture.height, picture.width) == size else resize_crop(picture, size)
