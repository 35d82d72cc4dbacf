"""Online RL on the forward process: DiffusionNFT and advantage-weighted matching.

Pictures are sampled by the old policy and scored; training noises them again and never sees how they came to be. Noise
and noise level of a point are functions of (seed, iteration, picture, number of the point).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.advantages import group_advantages, group_mean_batch_std_advantages
from diffalign.algorithms.base import Context
from diffalign.algorithms.drawing import Drawing, Drawn, LearnsFromDrawing
from diffalign.algorithms.experience import minibatch_shares
from diffalign.algorithms.snapshots import PolicySnapshot
from diffalign.config.forward_process import AWMConfig, ForwardProcessConfig, ForwardProcessRun, NFTConfig
from diffalign.data.prompts import PromptSource, load_prompts
from diffalign.errors import ConfigError
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import squared_error
from diffalign.losses.forward_process import advantage_weighted_matching, diffusion_nft, with_reference
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import generator

COMPARE = {"group": group_advantages, "group_mean_batch_std": group_mean_batch_std_advantages}


@dataclass(frozen=True)
class Pictures:
    """What an iteration learns from on this process: B pictures, their levels [B, L] (timesteps), advantages [B]."""

    drawn: Drawn
    levels: Tensor
    advantages: Tensor


@dataclass(frozen=True)
class PointBatch:
    """K points: pictures `samples` [K] of this process, each at its noise level `numbers` [K] of the iteration.

    t: [K] timesteps; advantages: [K]; K prompts and seeds; on_policy: the old policy is the policy.
    """

    samples: Tensor
    numbers: Tensor
    t: Tensor
    advantages: Tensor
    prompts: list[str]
    seeds: list[int]
    on_policy: bool
    weight: float


@dataclass(frozen=True)
class Points:
    """K points of the forward process, as the losses see them: x_t, x_0 and eps [K, C, H, W]; t and A [K]."""

    x: Tensor
    x0: Tensor
    noise: Tensor
    t: Tensor
    advantages: Tensor


class ForwardProcessRL(LearnsFromDrawing):
    """Sample pictures with the old policy, score them, noise them again, learn from the contrast.

    The old policy follows the policy at the start of each iteration: old <- d old + (1 - d) policy.
    """

    def __init__(
        self, config: ForwardProcessConfig, guidance_scale: float, denoiser: Denoiser, drawing: Drawing,
        context: Context,
    ) -> None:  # fmt: skip
        self.config, self.denoiser, self.drawing, self.context = config, denoiser, drawing, context
        self.guidance_scale = guidance_scale
        self.uses_reference = config.kl_weight > 0
        self.old = PolicySnapshot(denoiser.trainable_parameters())
        self._followed = 0  # iterations whose updates the old policy has taken in
        self._iteration = 0
        self._pictures: Pictures | None = None
        share = config.prompts_per_iteration * config.group_size // context.world
        if share % config.updates_per_iteration:
            raise ConfigError(
                f"algorithm.updates_per_iteration: {config.updates_per_iteration} does not divide the {share} "
                f"pictures that each of {context.world} processes samples"
            )

    @abstractmethod
    def decay(self, updates: int) -> float:
        """d after so many updates of the run."""

    @abstractmethod
    def policy_loss(self, points: Points, prediction: Tensor, old: Tensor) -> LossOutput:
        """The loss but for the reference; `old` is what the old policy predicts, without gradient."""

    # Sampling

    def updates(self, iteration: int) -> Iterator[list[PointBatch]]:
        if self._followed < iteration:
            self._follow(iteration)
        with self.old.swapped_in():
            drawn = self.drawing.draw(iteration)
        config, self._iteration = self.config, iteration
        advantages = COMPARE[config.advantage](drawn.rewards.flatten(), config.group_size)
        self._pictures = Pictures(drawn, self._noise_levels(drawn), drawn.mine(advantages))
        on_policy = self.decay(iteration * config.updates_per_iteration) == 0  # until the first update
        shares = minibatch_shares(
            self.context.seed, iteration, 0,
            prompts=config.prompts_per_iteration, group_size=config.group_size,
            shares=config.updates_per_iteration,
        ).flatten()[drawn.rows]  # fmt: skip
        mixing = generator(self.context.seed, "mixing", iteration, 0, self.context.rank)
        for number in range(config.updates_per_iteration):
            share = (shares == number).nonzero().flatten()
            pairs = torch.cartesian_prod(share, torch.arange(config.noise_levels)).view(-1, 2)
            pairs = pairs[torch.randperm(len(pairs), generator=mixing)]
            yield [
                self._batch(samples, numbers, on_policy and number == 0, len(samples) / len(pairs))
                for samples, numbers in (part.T for part in pairs.split(config.train_batch_size))
            ]

    def _follow(self, iteration: int) -> None:
        """Let the old policy take in the updates done so far."""
        decay = self.decay(iteration * self.config.updates_per_iteration)
        live = self.denoiser.trainable_parameters()
        self.old.load_tensors(
            {name: torch.lerp(live[name].detach(), kept, decay) for name, kept in self.old.tensors().items()}
        )
        self._followed = iteration

    def _noise_levels(self, drawn: Drawn) -> Tensor:
        """Timesteps [B, noise_levels]: for each picture one of each equal part of the schedule."""
        count, total = self.config.noise_levels, self.denoiser.schedule.num_timesteps
        within = torch.stack(
            [torch.rand(count, generator=self._draw("levels", row)) for row in drawn.rows.tolist()]
        )
        return ((torch.arange(count) + within) / count * total).long().clamp_max(total - 1)

    def _draw(self, purpose: str, row: int, *keys: int) -> torch.Generator:
        return generator(self.context.seed, purpose, self._iteration, row, *keys)

    def _batch(self, samples: Tensor, numbers: Tensor, on_policy: bool, weight: float) -> PointBatch:
        assert self._pictures is not None
        drawn, advantages = self._pictures.drawn, self._pictures.advantages
        return PointBatch(
            samples,
            numbers,
            self._pictures.levels[samples, numbers],
            advantages[samples.to(advantages.device)],
            [drawn.prompts[i] for i in samples.tolist()],
            [drawn.seeds[i] for i in samples.tolist()],
            on_policy,
            weight,
        )

    # Learning

    def loss(self, batch: PointBatch) -> LossOutput:
        self.context.meter.count("training_pictures", len(batch.samples) * self.context.world)
        points = self._points(batch)
        old = None
        if not batch.on_policy:
            with torch.no_grad(), self.old.swapped_in():
                old = self._predict(points, batch.prompts)
        prediction = self._predict(points, batch.prompts)
        out = self.policy_loss(points, prediction, prediction.detach() if old is None else old)
        if not self.config.kl_weight:
            return out
        with torch.no_grad(), self.denoiser.reference():
            reference = self._predict(points, batch.prompts)
        return with_reference(out, squared_error(prediction, reference), weight=self.config.kl_weight)

    def _points(self, batch: PointBatch) -> Points:
        assert self._pictures is not None
        device, drawn = self.denoiser.device, self._pictures.drawn
        x0 = drawn.latents[batch.samples.to(device)]
        rows = drawn.rows[batch.samples].tolist()
        noise = torch.stack(
            [
                torch.randn(x0.shape[1:], generator=self._draw("noise", row, number))
                for row, number in zip(rows, batch.numbers.tolist(), strict=True)
            ]
        ).to(device)
        t = batch.t.to(device)
        return Points(
            self.denoiser.schedule.add_noise(x0, noise, t), x0, noise, t, batch.advantages.to(device)
        )

    def _predict(self, points: Points, prompts: list[str]) -> Tensor:
        """As in sampling, so with its guidance."""
        conditioning = self.denoiser.encode_prompts(prompts)
        return self.denoiser.predict(points.x, points.t, conditioning, self.guidance_scale)

    # The loop's other questions

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "followed": self._followed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._followed = state["followed"]

    def tensors(self) -> dict[str, Tensor]:
        return self.old.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.old.load_tensors(tensors)


class DiffusionNFT(ForwardProcessRL):
    """`diffusion_nft`; the old policy is a moving average whose decay grows."""

    config: NFTConfig

    def decay(self, updates: int) -> float:
        return min(updates * self.config.old_decay_rate, self.config.old_decay_limit)

    def policy_loss(self, points: Points, prediction: Tensor, old: Tensor) -> LossOutput:
        schedule = self.denoiser.schedule
        predicted, _ = schedule.to_x0_eps(points.x, prediction, points.t)
        before, _ = schedule.to_x0_eps(points.x, old, points.t)
        return diffusion_nft(
            predicted, before, points.x0, points.advantages,
            beta=self.config.beta, advantage_clip=self.config.advantage_clip,
        )  # fmt: skip


class AdvantageWeightedMatching(ForwardProcessRL):
    """`advantage_weighted_matching`; the old policy is the one that the iteration began with."""

    config: AWMConfig

    def decay(self, updates: int) -> float:
        return 0.0

    def policy_loss(self, points: Points, prediction: Tensor, old: Tensor) -> LossOutput:
        target = self.denoiser.schedule.target(points.x0, points.noise, points.t)
        clip = self.config.advantage_clip
        return advantage_weighted_matching(
            squared_error(prediction, target), squared_error(old, target),
            points.advantages.clamp(-clip, clip), clip_range=self.config.clip_range,
        )  # fmt: skip


IMPLEMENTATIONS: dict[str, type[ForwardProcessRL]] = {
    "nft": DiffusionNFT,
    "awm": AdvantageWeightedMatching,
}


def open_data(config: ForwardProcessRun, reward: RewardMixture | None) -> PromptSource:
    return PromptSource(load_prompts(config.data.path), config.seed)


def build(
    config: ForwardProcessRun, data: PromptSource, denoiser: Denoiser, reward: RewardMixture | None,
    context: Context,
) -> ForwardProcessRL:  # fmt: skip
    assert reward is not None  # the configuration requires one
    options = config.algorithm
    drawing = Drawing(
        data, reward, denoiser, config.sampler, context,
        prompts_per_iteration=options.prompts_per_iteration, group_size=options.group_size,
        batch_size=options.sample_batch_size,
    )  # fmt: skip
    return IMPLEMENTATIONS[options.name](options, config.sampler.guidance_scale, denoiser, drawing, context)
