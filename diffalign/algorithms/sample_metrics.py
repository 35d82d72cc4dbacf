"""Figures of the pictures that an iteration of online RL sampled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.advantages import flat_groups


def reward_metrics(rewards: Tensor, components: dict[str, Tensor], group_size: int) -> dict[str, float]:
    """Of rewards [B] and their components [B] of all processes, whole groups after each other.

    `reward/flat_groups`: the share of groups whose rewards are all equal, from which nothing is learned.
    """
    metrics = {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(correction=0)),
        "reward/group_std": float(rewards.view(-1, group_size).std(dim=1, correction=0).mean()),
    }
    if group_size > 1:
        metrics["reward/flat_groups"] = float(flat_groups(rewards, group_size).float().mean())
    return metrics | {f"reward/{label}": float(values.mean()) for label, values in components.items()}


def distance_in_groups(final: Tensor, group_size: int) -> Tensor:
    """Mean Euclidean distance of each finished latent [B, C, H, W] to the others of its group: [B]."""
    groups = final.float().flatten(1).view(-1, group_size, final[0].numel())
    distances = torch.cdist(groups, groups, compute_mode="donot_use_mm_for_euclid_dist")
    return (distances.sum(dim=2) / (group_size - 1)).flatten()


class GroupDiversity:
    """Mean distance inside groups, as a share of the first iteration's: what the diversity guard watches."""

    def __init__(self) -> None:
        self._first: float | None = None

    def start(self, distance: float) -> None:
        """The mean of `distance_in_groups` over all pictures of an iteration; the first is what counts as 1."""
        if self._first is None:
            self._first = distance

    def metrics(self, distance: float | None) -> dict[str, float]:
        """`diversity/within_group`; nothing without groups, or where the first had no spread."""
        if distance is None or not self._first:
            return {}
        return {"diversity/within_group": distance / self._first}

    def state_dict(self) -> dict[str, Any]:
        return {"first_distance": self._first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._first = state.get("first_distance")
