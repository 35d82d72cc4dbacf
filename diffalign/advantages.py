"""From rewards to advantages: what is better than expected, in units of its spread.

Rewards of one iteration arrive gathered from all processes, so that every process computes the same statistics.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

EPSILON = 1e-6
"""Added to the standard deviation: equal rewards give advantage 0."""


def batch_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-6) over the whole batch; [B] float32. Population std, as in ddpo-pytorch."""
    rewards = rewards.float()
    return (rewards - rewards.mean()) / (rewards.std(correction=0) + EPSILON)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """Normalised inside each group of `group_size` consecutive rewards (GRPO, arXiv:2402.03300); [B] float32.

    Raises:
        ValueError: a group of one, or a batch that is not whole groups.
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not groups of {group_size} (at least 2 each)")
    groups = rewards.float().view(-1, group_size)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, correction=0, keepdim=True) + EPSILON)).flatten()


class PromptStatistics:
    """Running reward statistics of each prompt (arXiv:2305.13301, appendix; ddpo-pytorch `stat_tracking`).

    Args:
        buffer_size: the most recent rewards kept per prompt.
        min_count: until a prompt has this many, the batch's mean and std are used for it.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        self.buffer_size, self.min_count = buffer_size, min_count
        self._buffers: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Remember the rewards [B] of B prompts and return their advantages [B] float32."""
        if len(prompts) != len(rewards):
            raise ValueError(f"{len(prompts)} prompts and {len(rewards)} rewards are not pairs")
        rewards = rewards.float()
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            self._buffers.setdefault(prompt, deque(maxlen=self.buffer_size)).append(reward)
        advantages = batch_advantages(rewards)
        for prompt in dict.fromkeys(prompts):
            buffer = self._buffers[prompt]
            if len(buffer) < self.min_count:
                continue
            known = torch.tensor(list(buffer), device=rewards.device)
            rows = torch.tensor([p == prompt for p in prompts], device=rewards.device)
            advantages[rows] = (rewards[rows] - known.mean()) / (known.std(correction=0) + EPSILON)
        return advantages

    def state_dict(self) -> dict[str, list[float]]:
        """Prompt -> remembered rewards, oldest first (JSON-safe)."""
        return {prompt: list(buffer) for prompt, buffer in self._buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self._buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}
