"""Which of the pictures of a prompt are compared, and which prompts an update learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.config.trajectory_preference import ComparedConfig
from diffalign.errors import ConfigError


@dataclass(frozen=True)
class ComparedPairs:
    """Q pairs of the P prompts x G pictures whose rewards were given, those of a prompt after each other.

    Args:
        better, worse: [Q] int64, places prompt * G + member.
        gap: [Q] float32, reward of the better minus that of the worse; 0 is a tie.
    """

    better: Tensor
    worse: Tensor
    gap: Tensor

    @property
    def tied(self) -> Tensor:
        """[Q] bool, pairs of equal reward."""
        return self.gap == 0

    def probability(self, temperature: float | None) -> Tensor | None:
        """P(better is preferred) [Q] = sigmoid(gap / temperature), as Bradley-Terry has it; None without one."""
        return None if temperature is None else (self.gap / temperature).sigmoid()


def compare(rewards: Tensor, which: Literal["best_worst", "all"]) -> ComparedPairs:
    """The pairs of rewards [P, G]: of every prompt one, or G (G - 1) / 2.

    Where all pictures of a prompt have one reward, its best and its worst are the same picture.
    """
    rewards = rewards.float()
    prompts, size = rewards.shape
    if which == "best_worst":
        first, second = rewards.argmax(dim=1, keepdim=True), rewards.argmin(dim=1, keepdim=True)
    else:
        members = torch.triu_indices(size, size, offset=1, device=rewards.device)
        first, second = (row.expand(prompts, -1) for row in members)
    gap = rewards.gather(1, first) - rewards.gather(1, second)
    better, worse = torch.where(gap >= 0, first, second), torch.where(gap >= 0, second, first)
    offset = torch.arange(prompts, device=rewards.device)[:, None] * size
    return ComparedPairs((better + offset).flatten(), (worse + offset).flatten(), gap.abs().flatten())


def prompts_per_update(config: ComparedConfig, context: Context) -> int:
    """How many prompts of this process an update takes: those of update u are the u-th so many in their order.

    Process r of N has prompts r, r + N, ... of an iteration, so an update takes the same prompts whatever N is.

    Raises:
        ConfigError: the prompts of a process are not equal shares.
    """
    share = context.share(config.prompts_per_iteration)
    if share % config.updates_per_epoch:
        raise ConfigError(
            f"algorithm.updates_per_epoch: {config.updates_per_epoch} does not divide the {share} prompts that "
            f"each of {context.world} processes samples"
        )
    return share // config.updates_per_epoch
