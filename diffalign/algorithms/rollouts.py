"""Trajectories of an iteration, sampled batch by batch and scored beside it; can be interrupted and gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffalign.algorithms.assignment import Assignment
from diffalign.algorithms.base import Context
from diffalign.algorithms.experience import trajectory_from, trajectory_tensors
from diffalign.algorithms.scored_batches import ScoredBatches
from diffalign.config.online import TrajectoryRLConfig
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.trajectory import Trajectory, Transition, branched_rollout, rollout
from diffalign.transitions import Sampler


class Rollouts:
    """What this process has sampled of an iteration so far."""

    def __init__(
        self,
        config: TrajectoryRLConfig,
        sampler: Sampler,
        denoiser: Denoiser,
        reward: RewardMixture,
        context: Context,
    ) -> None:
        self.config, self.sampler, self.denoiser, self.context = config, sampler, denoiser, context
        self._batches = ScoredBatches(
            reward, denoiser, context,
            size=config.sample_batch_size, trajectories=True, in_background=config.score_in_background,
        )  # fmt: skip

    @property
    def work_saved(self) -> float:
        """Share of the denoiser's work that sampling saves by steps shared inside groups."""
        return self.config.shared_steps / len(self.sampler) * (1 - 1 / self.config.group_size)

    def sample(self, assignment: Assignment) -> tuple[Trajectory, dict[str, Tensor]]:
        """Trajectories and the components [B] of their rewards; batches that are there already are kept.

        Raises:
            NumericsError: a score that is not finite, with prompts and seeds as evidence.
        """
        sampled, components = self._batches.sample(
            assignment.prompts,
            assignment.seeds,
            lambda rows: trajectory_tensors(self._trajectory(assignment, rows)),
        )
        return trajectory_from(self.sampler, sampled, self.denoiser.device), components

    def _trajectory(self, assignment: Assignment, rows: slice) -> Trajectory:
        noisy = None if assignment.noisy is None else assignment.noisy[:, rows]
        steps = self.context.watched(self._steps(assignment, rows, noisy))
        return Trajectory.collect(self.sampler, steps, keep_means=self.config.normalize_ratio, noisy=noisy)

    def _steps(self, assignment: Assignment, rows: slice, noisy: Tensor | None) -> Iterator[Transition]:
        config, seeds = self.config, assignment.seeds[rows]
        conditioning = self.denoiser.encode_prompts(assignment.prompts[rows])
        common: dict[str, Any] = {"storage_dtype": getattr(torch, config.storage_dtype), "noisy": noisy}
        if not config.shared_steps:
            return rollout(self.denoiser, conditioning, self.sampler, seeds, **common)
        groups = slice(rows.start // config.group_size, rows.stop // config.group_size)
        return branched_rollout(
            self.denoiser, conditioning, self.sampler, seeds,
            group_seeds=assignment.group_seeds[groups], shared_steps=config.shared_steps, **common,
        )  # fmt: skip

    # What is kept when a run is told to stop while sampling

    def __len__(self) -> int:
        """How many batches there are so far."""
        return len(self._batches)

    def clear(self) -> None:
        self._batches.clear()

    def tensors(self) -> dict[str, Tensor]:
        """The batches so far; `take_up` is the way back."""
        return self._batches.tensors()

    def take_up(self, tensors: dict[str, Tensor], count: int) -> None:
        """Go on from `count` batches that `tensors` gave."""
        device = self.denoiser.device
        here = {name: t if name.endswith("noisy") else t.to(device) for name, t in tensors.items()}
        self._batches.take_up(here, count)
