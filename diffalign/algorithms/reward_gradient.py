"""Reward gradients: the reward of a sampled picture, differentiated with respect to the weights that sampled it.

ReFL, DRaFT and AlignProp are one algorithm. They differ in which denoising steps carry the gradient, and in what they
do with the reward: `_stops`, `_sample` and `_objective` are all of the difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.algorithms.base import Algorithm, Context
from diffalign.backpropagation import (
    Differentiation,
    Sampled,
    backpropagated_rollout,
    denoised_again,
    predicted_x0,
)
from diffalign.config import (
    AlignPropConfig,
    DRaFTConfig,
    ReFLConfig,
    RewardGradientConfig,
    RewardGradientRun,
    SamplerConfig,
)
from diffalign.data.prompts import PromptSource, load_prompts
from diffalign.errors import ConfigError, NumericsError, RewardError
from diffalign.losses.base import LossOutput
from diffalign.losses.reward_gradient import reward_ascent, reward_hinge, with_divergence
from diffalign.models.base import Conditioning, Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import derive_seed, generator
from diffalign.transitions import Sampler


@dataclass(frozen=True)
class PictureBatch:
    """B pictures to sample, score and learn from.

    `stops`: steps of each picture that are done without gradient; ReFL draws one per picture, for the others they are
    alike.
    """

    prompts: list[str]
    seeds: list[int]
    stops: list[int]
    weight: float


class RewardGradient(Algorithm):
    """Sample pictures, score them, follow the gradient of the reward through the last steps of the sampling."""

    def __init__(
        self,
        config: RewardGradientConfig,
        sampler: SamplerConfig,
        denoiser: Denoiser,
        prompts: PromptSource,
        reward: RewardMixture,
        context: Context,
    ) -> None:
        self.config, self.denoiser, self.prompts, self.reward, self.context = (
            config, denoiser, prompts, reward, context,
        )  # fmt: skip
        self.sampler = denoiser.make_sampler(sampler)
        self.uses_reference = config.kl_weight > 0
        self._sums = RewardSums(reward.labels)
        self._iteration, self._taken_up = -1, False
        self._metrics: dict[str, float] = {}
        context.share(config.prompts_per_iteration)
        if self.uses_reference and config.kl == "step":
            _require_noise(config, self.sampler)

    # What is drawn

    def updates(self, iteration: int) -> Iterator[list[PictureBatch]]:
        if not self._taken_up:
            self._sums.clear()
        self._taken_up, self._iteration = False, iteration
        yield self._batches(iteration)
        self.reward.offload()
        self._metrics = self._sums.over_all(self.context)

    def _batches(self, iteration: int) -> list[PictureBatch]:
        context, config = self.context, self.config
        drawn = self.prompts.draw(iteration, config.prompts_per_iteration)
        mine = list(range(context.rank, len(drawn), context.world))
        stops = _stops(config, len(self.sampler), context.seed, iteration, mine)
        batches = []
        for start in range(0, len(mine), config.train_batch_size):
            rows = mine[start : start + config.train_batch_size]
            seeds = [derive_seed(context.seed, "rollout", iteration, row) for row in rows]
            these = stops[start : start + config.train_batch_size]
            batches.append(PictureBatch([drawn[r] for r in rows], seeds, these, len(rows) / len(mine)))
        return batches

    # Learning

    def loss(self, batch: PictureBatch) -> LossOutput:
        sampled = self._sample(batch)
        self.context.poll()
        pictures = checkpoint(
            self.denoiser.decode, sampled.latents, use_reentrant=False, preserve_rng_state=False
        )
        copies = len(pictures) // len(batch.prompts)
        prompts = batch.prompts * copies
        try:
            scores = self.reward(pictures, prompts)
        except NumericsError as error:
            error.evidence = {"prompts": batch.prompts, "seeds": batch.seeds}
            raise
        self._count(batch, copies)
        first = len(batch.prompts)  # copies of DRaFT-LV are not pictures of the sampler
        self._sums.add(
            scores.total[:first], {label: part[:first] for label, part in scores.components.items()}
        )
        out = self._objective(scores.total)
        if not self.uses_reference:
            return out
        return with_divergence(out, sampled.divergence, weight=self.config.kl_weight)

    def _sample(self, batch: PictureBatch) -> Sampled:
        """The pictures of a batch; DRaFT-LV's copies of all of them follow, one round after the other."""
        run = Differentiation(
            self.denoiser,
            self.sampler,
            self.denoiser.encode_prompts(batch.prompts),
            self._reference(batch.prompts),
            self.config.kl,
            self.config.checkpoint_steps,
            self.context.poll,
        )
        if isinstance(self.config, ReFLConfig):
            return predicted_x0(run, batch.seeds, batch.stops)
        sampled = backpropagated_rollout(run, batch.seeds, len(self.sampler) - batch.stops[0])
        if isinstance(self.config, DRaFTConfig) and self.config.low_variance_samples:
            copies = range(self.config.low_variance_samples)
            again = [denoised_again(run, sampled.latents, batch.seeds, copy) for copy in copies]
            return Sampled.concatenate([sampled, *again])
        return sampled

    def _reference(self, prompts: list[str]) -> Conditioning | None:
        if not self.uses_reference:
            return None
        with torch.no_grad(), self.denoiser.reference():
            return self.denoiser.encode_prompts(prompts)

    def _objective(self, reward: Tensor) -> LossOutput:
        if isinstance(self.config, ReFLConfig):
            return reward_hinge(reward, ceiling=self.config.reward_ceiling, scale=self.config.loss_scale)
        return reward_ascent(reward)

    def _count(self, batch: PictureBatch, copies: int) -> None:
        """Costs, over all processes; the work of a batch is done, and it is not taken again."""
        count, context = len(batch.prompts), self.context
        differentiated = copies if copies > 1 else len(self.sampler) - batch.stops[0]
        if isinstance(self.config, ReFLConfig):
            differentiated = 1
        context.meter.count("sampled_pictures", count * context.world)
        context.meter.count("training_pictures", count * differentiated * context.world)
        context.meter.count("reward_queries", count * copies * len(self.reward.labels) * context.world)

    # The loop's other questions

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self._iteration != iteration or not self._sums.values:
            return None
        return {}, {"iteration": iteration, "sums": self._sums.values}

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._iteration, self._taken_up = state["iteration"], True
        self._sums.values = state["sums"]


class RewardSums:
    """Sums of an iteration's rewards on this process, from which mean and spread over all processes follow.

    `values`: JSON-safe; number of pictures, sum and sum of squares of the total, sums of the components by label.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels, self.values = list(labels), list[float]()

    def clear(self) -> None:
        self.values = []

    def add(self, total: Tensor, components: dict[str, Tensor]) -> None:
        total = total.detach().double()
        parts = [components[label].detach().double().sum() for label in self.labels]
        news = [float(len(total)), float(total.sum()), float(total.square().sum()), *map(float, parts)]
        self.values = [a + b for a, b in zip(self.values or [0.0] * len(news), news, strict=True)]

    def over_all(self, context: Context) -> dict[str, float]:
        """Mean and spread of the reward and means of its components, of all processes' pictures; all must call it."""
        mine = self.values or [0.0] * (3 + len(self.labels))
        sums = context.gather(torch.tensor(mine, dtype=torch.float64, device=context.device))
        count, total, squares, *parts = sums.view(-1, len(mine)).sum(dim=0).tolist()
        if not count:
            return {}
        mean = total / count
        spread = max(0.0, squares / count - mean**2) ** 0.5
        means = {f"reward/{label}": part / count for label, part in zip(self.labels, parts, strict=True)}
        return {"reward/mean": mean, "reward/std": spread, **means}


def _stops(config: RewardGradientConfig, steps: int, seed: int, iteration: int, rows: list[int]) -> list[int]:
    """Steps without gradient of each of `rows`: drawn per picture (ReFL), per iteration (AlignProp), or fixed."""
    if isinstance(config, ReFLConfig):
        low, high = config.stop_range
        return [_between(low, high, seed, "stop", iteration, row) for row in rows]
    if isinstance(config, AlignPropConfig):
        fewest, most = config.backprop_range or (1, steps)
        depth = _between(fewest, most, seed, "backprop steps", iteration)
    else:
        assert isinstance(config, DRaFTConfig)
        depth = config.backprop_steps
    return [steps - depth] * len(rows)


def _between(low: int, high: int, seed: int, *keys: int | str) -> int:
    """A whole number from low to high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator(seed, *keys)))


def _require_noise(config: RewardGradientConfig, sampler: Sampler) -> None:
    """Refuse a KL of steps where none that can be differentiated has noise."""
    steps = range(len(sampler))
    if isinstance(config, ReFLConfig):
        steps = range(config.stop_range[0], config.stop_range[1] + 1)
    elif isinstance(config, DRaFTConfig):
        steps = range(len(sampler) - config.backprop_steps, len(sampler))
    elif isinstance(config, AlignPropConfig) and config.backprop_range is not None:
        steps = range(len(sampler) - config.backprop_range[1], len(sampler))
    if not set(steps) & set(sampler.stochastic_steps()):
        raise ConfigError(
            "algorithm.kl: none of the steps that gradients go through has noise, so they have no KL",
            why="the last step of this checkpoint's sampler is deterministic",
            hint="set algorithm.kl to prediction, or differentiate more steps",
        )


def open_data(config: RewardGradientRun, reward: RewardMixture | None) -> PromptSource:
    if reward is not None:
        try:
            reward.require_gradients(config.algorithm.name)
        except RewardError as error:
            error.what = f"rewards: {error.what}"  # the option whose line is added to the message
            raise
    return PromptSource(load_prompts(config.data.path), config.seed)


def build(
    config: RewardGradientRun,
    data: PromptSource,
    denoiser: Denoiser,
    reward: RewardMixture | None,
    context: Context,
) -> RewardGradient:
    assert reward is not None  # the configuration requires one
    return RewardGradient(config.algorithm, config.sampler, denoiser, data, reward, context)
