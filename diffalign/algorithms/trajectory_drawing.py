"""`Drawing` that keeps the trajectories of the pictures too."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.algorithms.drawing import Drawing, Drawn
from diffalign.algorithms.experience import trajectory_from, trajectory_tensors
from diffalign.config import SamplerConfig
from diffalign.config.trajectory_preference import TrajectoryComparedConfig
from diffalign.data.prompts import PromptSource
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import sample_noise
from diffalign.trajectory import Trajectory, rollout


class TrajectoryDrawing(Drawing):
    """After `draw`, `trajectory` has what its latents came from. See `Drawing`."""

    keeps_trajectories: ClassVar[bool] = True

    def __init__(
        self,
        config: TrajectoryComparedConfig,
        sampler: SamplerConfig,
        denoiser: Denoiser,
        prompts: PromptSource,
        reward: RewardMixture,
        context: Context,
    ) -> None:
        super().__init__(
            prompts, reward, denoiser, sampler, context,
            prompts_per_iteration=config.prompts_per_iteration,
            group_size=config.group_size,
            batch_size=config.sample_batch_size,
        )  # fmt: skip
        self._shared_noise = config.shared_noise
        self._first_of: dict[int, int] = {}  # seed -> that of the first member of its group

    @property
    def trajectory(self) -> Trajectory:
        """Of the pictures of the last `draw`, in their order."""
        return trajectory_from(self.sampler, self._sampled, self.denoiser.device)

    def draw(self, iteration: int) -> Drawn:
        _, seeds, _ = self._my_share(iteration)
        self._first_of = {seed: seeds[i - i % self.group_size] for i, seed in enumerate(seeds)}
        return super().draw(iteration)

    def _sample_batch(self, prompts: list[str], seeds: list[int]) -> dict[str, Tensor]:
        conditioning = self.denoiser.encode_prompts(prompts)
        start = None
        if self._shared_noise:
            firsts = [self._first_of[seed] for seed in seeds]
            start = sample_noise(self.denoiser.latent_shape, firsts, "initial").to(self.denoiser.device)
        steps = rollout(self.denoiser, conditioning, self.sampler, seeds, start=start)
        return trajectory_tensors(Trajectory.collect(self.sampler, self.context.watched(steps)))
