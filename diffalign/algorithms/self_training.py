"""Supervised updates on pictures weighted by their rewards: what RAFT and reward-weighted regression share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.algorithms.drawing import Drawing, Drawn, LearnsFromDrawing
from diffalign.algorithms.points import PointBatch, Points
from diffalign.config.supervised import SelfTrainingConfig
from diffalign.data.order import batch_indices, batch_positions, first_seen
from diffalign.losses.base import LossOutput
from diffalign.losses.reward_weighting import effective_share
from diffalign.models.base import Denoiser
from diffalign.seeding import derive_seed

Weigh = Callable[[Tensor, Sequence[str]], Tensor]
"""Weights [N] of N pictures from their rewards [N] and their N prompts; 0 leaves one out."""


class WeightedPool:
    """Pictures with weights, walked through as `data/order.py` does; those of weight 0 are never drawn.

    Args:
        take: latents [n, C, H, W] of n indices, on the denoiser's device; called before `caption`.
        weights: [N] on the CPU; scaled to a mean of 1 over the pictures that are drawn.
        seed: of the order.
    """

    def __init__(
        self,
        take: Callable[[Sequence[int]], Tensor],
        caption: Callable[[int], str],
        weights: Tensor,
        seed: int,
    ) -> None:
        self._take, self._caption, self._seed = take, caption, seed
        self._kept = weights.nonzero().flatten()
        self._importance = weights[self._kept] / weights[self._kept].mean()
        self._is_weighted = bool((self._importance != self._importance[0]).any())

    def __len__(self) -> int:
        return len(self._kept)

    def batch(
        self, points: Points, step: int, place: int, weight: float, *, captioned: bool = False
    ) -> PointBatch:
        """Batch `step` of the walk, at batch `place` of the run.

        Args:
            captioned: its captions are given ones, and count as seen.
        """
        context, size = points.context, points.config.batch_size
        numbers = batch_indices(len(self), size, step, self._seed, context.rank, context.world)
        indices = self._kept[numbers].tolist()
        x0 = self._take(indices)
        return points.batch(
            x0,
            [self._caption(index) for index in indices],
            batch_positions(size, place, context.rank, context.world),
            importance=self._importance[numbers] if self._is_weighted else None,
            new_captions=first_seen(len(self), size * context.world, step) if captioned else 0,
            weight=weight,
        )


class SelfTraining(LearnsFromDrawing):
    """Draw pictures with the present policy, weigh them by their rewards, fit them by the denoising loss.

    Args:
        weigh: from the rewards of all processes, so that each computes the same weights.
    """

    uses_reference = False

    def __init__(
        self,
        config: SelfTrainingConfig,
        denoiser: Denoiser,
        drawing: Drawing,
        weigh: Weigh,
        context: Context,
    ) -> None:
        self.config, self.drawing, self.context = config, drawing, context
        self._weigh, self._points = weigh, Points(config, denoiser, context, "self-training")
        self._metrics: dict[str, float] = {}

    def updates(self, iteration: int) -> Iterator[list[PointBatch]]:
        config = self.config
        drawn = self.drawing.draw(iteration)
        prompts = self._all_prompts(iteration)
        rewards = drawn.rewards.flatten().cpu()
        weights = self._weigh(rewards, prompts)
        self._metrics = self.drawing.metrics() | {
            "reward/weighted": float((weights.double() * rewards.double()).sum() / weights.double().sum()),
            "weights/effective_share": effective_share(weights),
        }
        latents = self._all_latents(drawn)
        pool = WeightedPool(
            lambda indices: latents[list(indices)],
            prompts.__getitem__,
            weights,
            derive_seed(self.context.seed, "kept", iteration),
        )
        accumulation = config.gradient_accumulation
        batches = config.updates_per_iteration * accumulation
        for step in range(0, batches, accumulation):
            yield [
                pool.batch(self._points, step + i, iteration * batches + step + i, 1 / accumulation)
                for i in range(accumulation)
            ]

    def _all_prompts(self, iteration: int) -> list[str]:
        drawn = self.drawing.prompts.draw(iteration, self.drawing.prompts_per_iteration)
        return [prompt for prompt in drawn for _ in range(self.drawing.group_size)]

    def _all_latents(self, drawn: Drawn) -> Tensor:
        """Of all processes [P G, C, H, W], in the order of the prompts drawn: small, and a batch may need any."""
        world, group, shape = self.context.world, self.drawing.group_size, drawn.latents.shape[1:]
        gathered = self.context.gather(drawn.latents)
        return gathered.view(world, -1, group, *shape).transpose(0, 1).reshape(-1, *shape)

    def loss(self, batch: PointBatch) -> LossOutput:
        return self._points.loss(batch)

    def metrics(self) -> dict[str, float]:
        """Rewards of the pictures drawn, and of those learned from (`reward/weighted`: their weighted mean)."""
        return dict(self._metrics)
