"""Several rewards as one: a weighted sum, with every component kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffalign.config import RewardConfig
from diffalign.errors import RewardError
from diffalign.rewards.model import Images, RewardModel, check_pairs, sharing_batches
from diffalign.rewards.registry import load_reward


@dataclass(frozen=True)
class Scores:
    """One call's scores: `total` [B] and, by label, the [B] it is the weighted sum of."""

    total: Tensor
    components: dict[str, Tensor]


class RewardMixture:
    """sum over rewards of weight * score.

    `higher_is_better` is not consulted: a reward to be minimised has a negative weight. A weight of 0 only
    watches. Rewards that share a backbone run it once a batch.
    """

    def __init__(self, specs: Sequence[RewardConfig], device: str | torch.device = "cpu") -> None:
        if not specs:
            raise RewardError("a mixture needs at least one reward")
        self.device = torch.device(device)
        self.rewards: dict[str, RewardModel] = {}
        self.weights: dict[str, float] = {}
        for spec in specs:
            label = spec.label or spec.name
            if label in self.rewards:
                raise RewardError(f"the reward {label} is listed twice", hint="give each its own label")
            self.rewards[label] = load_reward(spec.name, device=self.device, **spec.options)
            self.weights[label] = spec.weight

    @property
    def labels(self) -> list[str]:
        """In the order of the configuration."""
        return list(self.rewards)

    @property
    def needs_prompt(self) -> bool:
        return any(reward.needs_prompt for reward in self.rewards.values())

    def watch(self, label: str) -> bool:
        """Whether this component is only measured (weight 0)."""
        return self.weights[label] == 0

    def to(self, device: str | torch.device) -> Self:
        self.device = torch.device(device)
        for reward in self.rewards.values():
            reward.to(self.device)
        return self

    def __call__(self, images: Images, prompts: Sequence[str]) -> Scores:
        """Score B pictures with their B prompts; arguments and errors as in `RewardModel.__call__`."""
        batch = check_pairs(images, prompts, self.device)
        with sharing_batches():
            components = {label: reward(batch, prompts) for label, reward in self.rewards.items()}
        total = torch.zeros(len(prompts), device=self.device)
        for label, scores in components.items():
            if self.weights[label]:
                total = total + self.weights[label] * scores
        return Scores(total, components)
