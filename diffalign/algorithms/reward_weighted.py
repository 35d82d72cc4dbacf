"""Reward-weighted regression: the denoising loss on pictures that count by their reward.

On the policy's own pictures, sampled anew every iteration (Black et al. 2023, arXiv:2305.13301, section 4.2), or on
given ones, scored once at the start (as Lee et al. 2023, arXiv:2302.12192, whose weight is the reward itself).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.drawing import Drawing
from diffalign.algorithms.points import PointBatch, Points
from diffalign.algorithms.self_training import SelfTraining, WeightedPool
from diffalign.algorithms.sft import CaptionedLatents
from diffalign.config.supervised import RWRConfig, RWRRun
from diffalign.data.images import CaptionedImages
from diffalign.data.prompts import PromptSource, load_prompts
from diffalign.errors import DataError, NumericsError
from diffalign.losses.base import LossOutput
from diffalign.losses.reward_weighting import effective_share, exponential_weights, top_weights
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture


def weigh(config: RWRConfig, rewards: Tensor, prompts: Sequence[str]) -> Tensor:
    """Weights [N] of N pictures, compared with all of them or with those of the same prompt."""
    groups = torch.zeros(len(rewards), dtype=torch.int64)
    if config.compare == "prompt":
        numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        groups = torch.tensor([numbers[prompt] for prompt in prompts])
    if config.weights == "top":
        return top_weights(rewards, groups, share=config.top_share)
    return exponential_weights(rewards, groups, temperature=config.temperature)


class RewardWeightedData(Algorithm):
    """Reward-weighted regression on given pictures.

    They are scored before the first update; the scores are part of the state, so that a resumed run keeps them.
    """

    uses_reference = False

    def __init__(
        self,
        config: RWRConfig,
        denoiser: Denoiser,
        images: CaptionedImages,
        reward: RewardMixture,
        context: Context,
        *,
        cache_latents: bool = True,
    ) -> None:
        self.config, self.reward, self.context = config, reward, context
        self._points = Points(config, denoiser, context, "rwr")
        self._pictures = CaptionedLatents(images, denoiser, context, cached=cache_latents)
        self._captions = [images.caption(index) for index in range(len(images))]
        self._device = denoiser.device
        self._scored: dict[str, Tensor] = {}  # of this process's share, as far as it is
        self._scores: dict[str, Tensor] = {}  # [N] of all
        self._pool: WeightedPool | None = None
        self._metrics: dict[str, float] = {}

    def updates(self, iteration: int) -> Iterator[list[PointBatch]]:
        if self._pool is None:
            self._pool = self._weighted_pool()
        accumulation = self.config.gradient_accumulation
        batches = self.config.updates_per_iteration * accumulation
        for step in range(iteration * batches, (iteration + 1) * batches, accumulation):
            yield [
                self._pool.batch(self._points, step + i, step + i, 1 / accumulation, captioned=True)
                for i in range(accumulation)
            ]

    def _weighted_pool(self) -> WeightedPool:
        rewards = self._rewards()
        weights = weigh(self.config, rewards, self._captions)
        self._metrics = {"weights/effective_share": effective_share(weights)}
        self.context.say(
            f"rewards of {len(rewards):,} pictures: {float(rewards.mean()):.4g} +- "
            f"{float(rewards.std(correction=0)):.2g}; weighted mean "
            f"{float((weights * rewards).sum() / weights.sum()):.4g}, as certain as "
            f"{self._metrics['weights/effective_share']:.0%} of them weighted alike"
        )
        return WeightedPool(self._pictures.batch, self._pictures.caption, weights, self.context.seed)

    def _rewards(self) -> Tensor:
        """[N] float32 on the CPU; scored now, unless a resumed run has the scores."""
        if not self._scores:
            self._score_my_share()
            self._scores = {label: self._gather(scores) for label, scores in self._scored.items()}
            count = len(self._captions) * len(self._scores)
            self.context.meter.count("reward_queries", count)
            self._scored = {}
        rewards = self.reward.combine(self._scores).float()
        bad = (~rewards.isfinite()).nonzero().flatten().tolist()
        if bad:
            error = NumericsError(
                f"{len(bad)} of {len(rewards)} rewards are not finite",
                where=f"caption {self._captions[bad[0]]!r}",
                hint="scores must be finite, and not so large that their weighted sum overflows float32",
            )
            error.evidence = {"prompts": [self._captions[i] for i in bad], "pictures": bad}
            raise error
        return rewards

    def _score_my_share(self) -> None:
        """Scores of pictures rank, rank + world, ..; the last ones twice where shares would be unequal."""
        context, total, size = self.context, len(self._captions), self.config.sample_batch_size
        share = -(-total // context.world)
        mine = [min(context.rank + i * context.world, total - 1) for i in range(share)]
        done = len(next(iter(self._scored.values()), ()))
        with context.meter.phase("reward"):
            for start in range(done, share, size):
                context.poll()
                chunk = mine[start : start + size]
                pictures = torch.cat([self._pictures.pictures(index) for index in chunk]).to(self._device)
                captions = [self._pictures.caption(index) for index in chunk]
                try:
                    scores = self.reward(pictures, captions).components
                except NumericsError as error:
                    error.evidence = {"prompts": captions, "pictures": chunk}
                    raise
                for label, values in scores.items():
                    before = self._scored.get(label, values[:0].cpu())
                    self._scored[label] = torch.cat([before, values.cpu()])
        self.reward.offload()

    def _gather(self, scores: Tensor) -> Tensor:
        """[N] of all pictures, in their order, from the shares of all processes."""
        gathered = self.context.gather(scores.to(self.context.device)).cpu()
        return gathered.view(self.context.world, -1).T.flatten()[: len(self._captions)]

    def loss(self, batch: PointBatch) -> LossOutput:
        return self._points.loss(batch)

    def metrics(self) -> dict[str, float]:
        return dict(self._metrics)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": {label: values.tolist() for label, values in self._scores.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores = {label: torch.tensor(values) for label, values in state["scores"].items()}
        self._pool = None

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        return (dict(self._scored), {}) if self._scored else None

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._scored = {label: values.cpu() for label, values in tensors.items()}


def open_data(config: RWRRun, reward: RewardMixture | None) -> CaptionedImages | PromptSource:
    options, path = config.algorithm, config.data.path
    if options.source == "data":
        images = CaptionedImages(config.data)
        captions = [images.caption(index) for index in range(len(images))]
        if options.compare == "prompt" and max(Counter(captions).values()) == 1:
            raise _nothing_to_compare("no caption comes twice", path)
        return images
    prompts = load_prompts(path)
    alone = options.group_size == 1 and len(set(prompts)) == len(prompts) >= options.prompts_per_iteration
    if options.compare == "prompt" and alone:
        raise _nothing_to_compare("an iteration samples one picture of each prompt", path)
    return PromptSource(prompts, config.seed)


def _nothing_to_compare(why: str, path: str) -> DataError:
    return DataError(
        "algorithm.compare: prompt gives every picture the same weight",
        where=path,
        why=why,
        hint="set algorithm.compare to all, or have several pictures of each prompt (algorithm.group_size)",
    )


def build(
    config: RWRRun,
    data: CaptionedImages | PromptSource,
    denoiser: Denoiser,
    reward: RewardMixture | None,
    context: Context,
) -> Algorithm:
    assert reward is not None  # the configuration requires one
    options = config.algorithm
    if isinstance(data, CaptionedImages):
        cached = config.data.cache_latents
        return RewardWeightedData(options, denoiser, data, reward, context, cache_latents=cached)
    drawing = Drawing(
        data,
        reward,
        denoiser,
        config.sampler,
        context,
        prompts_per_iteration=options.prompts_per_iteration,
        group_size=options.group_size,
        batch_size=options.sample_batch_size,
    )
    return SelfTraining(
        options, denoiser, drawing, lambda rewards, prompts: weigh(options, rewards, prompts), context
    )
