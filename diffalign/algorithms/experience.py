"""What online RL samples and learns from, and how it is kept when a run is told to stop inside an iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.config.online import TrajectoryRLConfig
from diffalign.models.base import Conditioning
from diffalign.seeding import generator
from diffalign.trajectory import Trajectory
from diffalign.transitions import Sampler


@dataclass(frozen=True)
class StepBatch:
    """K (sample, step) pairs of the iteration's trajectories: indices [K], advantages [K], K prompts and seeds."""

    samples: Tensor
    steps: Tensor
    advantages: Tensor
    prompts: list[str]
    seeds: list[int]
    weight: float


@dataclass(frozen=True)
class Experience:
    """What one iteration sampled on this process.

    Args:
        trajectory: of B samples, N steps each; prompts, seeds, conditioning: theirs.
        steps: [B, M] int64 on the CPU, the steps of each sample that are trained on.
        advantages: [B, N], of each sample at each of its steps.
    """

    trajectory: Trajectory
    prompts: list[str]
    seeds: list[int]
    conditioning: Conditioning
    steps: Tensor
    advantages: Tensor


def trajectory_tensors(trajectory: Trajectory) -> dict[str, Tensor]:
    """The tensors of a trajectory by name."""
    names = ("latents", "log_probs", "means", "noisy")
    return {name: tensor for name in names if (tensor := getattr(trajectory, name)) is not None}


def trajectory_from(sampler: Sampler, tensors: dict[str, Tensor], device: torch.device) -> Trajectory:
    """The way back from `trajectory_tensors`."""
    means = tensors["means"].to(device) if "means" in tensors else None
    latents, log_probs = tensors["latents"].to(device), tensors["log_probs"].to(device)
    return Trajectory(sampler, latents, log_probs, means, tensors.get("noisy"))


def minibatch_shares(
    seed: int, iteration: int, epoch: int, *, prompts: int, group_size: int, shares: int
) -> Tensor:
    """Which of `shares` optimizer steps each sample of an iteration takes part in: int64 [prompts, group_size].

    Each group's members are shuffled, and all first members come before all second ones; equal shares of that row
    follow each other. So a share holds as many samples of every process as of any other (process r samples prompts r,
    r + N, ...), and which they are does not depend on the number of processes.
    """
    draw = generator(seed, "minibatches", iteration, epoch)
    place_in_group = torch.rand(prompts, group_size, generator=draw).argsort(dim=1)
    place = place_in_group * prompts + torch.arange(prompts)[:, None]
    return place * shares // (prompts * group_size)


def minibatches(
    experience: Experience, config: TrajectoryRLConfig, context: Context, iteration: int, epoch: int
) -> Iterator[list[StepBatch]]:
    """`updates_per_epoch` equal shares of all processes' samples, each sample with its own random timesteps."""
    group = config.group_size
    rows = range(context.rank, config.prompts_per_iteration, context.world)
    shares = minibatch_shares(
        context.seed, iteration, epoch,
        prompts=config.prompts_per_iteration, group_size=group, shares=config.updates_per_epoch,
    )[context.rank :: context.world].flatten()  # fmt: skip
    trained = experience.steps.shape[1]
    kept = max(1, round(config.timestep_fraction * trained))
    draws = [
        generator(context.seed, "timesteps", iteration, epoch, row * group + i)
        for row in rows
        for i in range(group)
    ]
    scores = torch.stack([torch.rand(trained, generator=draw) for draw in draws])
    steps = experience.steps.gather(1, scores.argsort(dim=1)[:, :kept].sort(dim=1).values)
    mixing = generator(context.seed, "mixing", iteration, epoch, context.rank)
    for number in range(config.updates_per_epoch):
        share = (shares == number).nonzero().flatten()
        pairs = torch.cartesian_prod(share, torch.arange(kept)).view(-1, 2)
        pairs = pairs[torch.randperm(len(pairs), generator=mixing)]
        yield [
            _step_batch(experience, samples, steps[samples, columns], len(samples) / len(pairs))
            for samples, columns in (part.T for part in pairs.split(config.train_batch_size))
        ]


def _step_batch(experience: Experience, samples: Tensor, steps: Tensor, weight: float) -> StepBatch:
    device = experience.advantages.device
    advantages = experience.advantages[samples.to(device), steps.to(device)]
    prompts = [experience.prompts[i] for i in samples.tolist()]
    seeds = [experience.seeds[i] for i in samples.tolist()]
    return StepBatch(samples, steps, advantages, prompts, seeds, weight)
