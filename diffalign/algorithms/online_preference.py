"""Online DPO: the policy's own pictures, compared by the rewards, make the pairs of a preference loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.algorithms.comparing import ComparedPairs, compare, prompts_per_update
from diffalign.algorithms.drawing import Drawing, Drawn, LearnsFromDrawing
from diffalign.config import SamplerConfig
from diffalign.config.trajectory_preference import OnlineDPOConfig, OnlineDPORun
from diffalign.data.prompts import PromptSource, load_prompts
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import squared_error
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import generator


@dataclass(frozen=True)
class DrawnPairBatch:
    """K pairs at one timestep each: x0_w, x0_l, noise [K, C, H, W] (one noise a pair), t [K], K prompts.

    `probability`, `gap` [K]: of the label, and between the rewards. K = 0 stands for pairs of equal reward, which
    teach nothing.
    """

    x0_w: Tensor
    x0_l: Tensor
    noise: Tensor
    t: Tensor
    prompts: list[str]
    probability: Tensor
    gap: Tensor
    weight: float


class OnlineDPO(LearnsFromDrawing):
    """Samples pictures, pairs those of a prompt by their rewards, and trains on the pairs as offline DPO would.

    The reference is the frozen starting point throughout. Pairs of equal reward are left out, unless labels are soft.
    """

    def __init__(
        self,
        config: OnlineDPOConfig,
        sampler: SamplerConfig,
        denoiser: Denoiser,
        prompts: PromptSource,
        reward: RewardMixture,
        context: Context,
    ) -> None:
        self.config, self.denoiser, self.context = config, denoiser, context
        self._entry = config.pair_loss
        self.uses_reference = self._entry.needs_reference
        self._function = self._entry.load()
        self._settings = self._entry.settings(config.beta, config.loss_options)
        self._prompts_per_update = prompts_per_update(config, context)
        self.drawing = Drawing(
            prompts, reward, denoiser, sampler, context,
            prompts_per_iteration=config.prompts_per_iteration,
            group_size=config.group_size,
            batch_size=config.sample_batch_size,
        )  # fmt: skip

    # Pairs

    def updates(self, iteration: int) -> Iterator[list[DrawnPairBatch]]:
        drawn = self.drawing.draw(iteration)
        rewards = drawn.rewards[self.context.rank :: self.context.world]
        for epoch in range(self.config.inner_epochs):
            for number in range(self.config.updates_per_epoch):
                size = self._prompts_per_update
                rows = range(number * size, (number + 1) * size)
                pairs = compare(rewards[rows.start : rows.stop], self.config.pairs)
                yield self._batches(drawn, pairs, rows, (iteration, epoch))

    def _batches(
        self, drawn: Drawn, pairs: ComparedPairs, rows: range, when: tuple[int, int]
    ) -> list[DrawnPairBatch]:
        """The pairs of the prompts `rows` of this process, each at `timesteps_per_pair` timesteps."""
        config = self.config
        judged = torch.ones_like(pairs.tied) if config.label_temperature is not None else ~pairs.tied
        repeats = torch.arange(config.timesteps_per_pair)
        items = torch.cartesian_prod(judged.nonzero().flatten().cpu(), repeats).view(-1, 2)
        total = len(pairs.gap) * config.timesteps_per_pair
        parts = [part for part in items.split(config.train_batch_size) if len(part)]
        batches = [self._batch(drawn, pairs, part, rows, when, len(part) / total) for part in parts]
        if len(items) < total:
            batches.append(self._batch(drawn, pairs, items[:0], rows, when, 1 - len(items) / total))
        return batches

    def _batch(
        self,
        drawn: Drawn,
        pairs: ComparedPairs,
        items: Tensor,
        rows: range,
        when: tuple[int, int],
        weight: float,
    ) -> DrawnPairBatch:
        """K items (pair, draw); what is drawn for one is a function of (seed, when, prompt's row, pair, draw)."""
        size, device = self.config.group_size, self.denoiser.device
        per_prompt = len(pairs.gap) // len(rows)
        noise = torch.empty(len(items), *self.denoiser.latent_shape)
        t = torch.empty(len(items), dtype=torch.long)
        for place, (pair, repeat) in enumerate(items.tolist()):
            row = (rows.start + pair // per_prompt) * self.context.world + self.context.rank
            draw = generator(self.context.seed, "online dpo", *when, row, pair % per_prompt, repeat)
            noise[place] = torch.randn(self.denoiser.latent_shape, generator=draw)
            t[place] = torch.randint(self.denoiser.schedule.num_timesteps, (), generator=draw)
        which = items[:, 0].to(pairs.gap.device)
        first = rows.start * size
        better, worse = pairs.better[which] + first, pairs.worse[which] + first
        probability = pairs.probability(self.config.label_temperature)
        if probability is None:
            probability = torch.ones_like(pairs.gap)
        return DrawnPairBatch(
            drawn.latents[better],
            drawn.latents[worse],
            noise.to(device),
            t.to(device),
            [drawn.prompts[i] for i in better.tolist()],
            probability[which],
            pairs.gap[which],
            weight,
        )

    # Learning

    def loss(self, batch: DrawnPairBatch) -> LossOutput:
        if not batch.prompts:
            weights = self.denoiser.trainable_parameters().values()
            return LossOutput(torch.stack([(weight * 0).sum() for weight in weights]).sum())
        self.context.meter.count("training_pictures", 2 * len(batch.prompts) * self.context.world)
        process = self.denoiser.schedule
        targets = [process.target(x0, batch.noise, batch.t) for x0 in (batch.x0_w, batch.x0_l)]
        policy = self._predict(batch)
        frozen: list[Tensor | None] = [None, None]
        extras: dict[str, Tensor] = {}
        if self.uses_reference:
            with torch.no_grad(), self.denoiser.reference():
                reference = self._predict(batch)
            frozen = [squared_error(*pair) for pair in zip(reference, targets, strict=True)]
            extras["distance_w"] = squared_error(policy[0], reference[0])
        extras["probability"] = batch.probability
        extras["margin"] = torch.tanh(batch.gap / 2)
        errors = [squared_error(*pair) for pair in zip(policy, targets, strict=True)]
        wanted = {name: extras[name] for name in self._entry.extras}
        out: LossOutput = self._function(*errors, *frozen, **self._settings, **wanted)
        return out

    def _predict(self, batch: DrawnPairBatch) -> tuple[Tensor, Tensor]:
        """Predictions [K, C, H, W] on the better and on the worse pictures, in one pass."""
        x0 = torch.cat([batch.x0_w, batch.x0_l])
        noise, t = batch.noise.repeat(2, 1, 1, 1), batch.t.repeat(2)
        x = self.denoiser.schedule.add_noise(x0, noise, t)
        better, worse = self.denoiser.predict(x, t, self.denoiser.encode_prompts(batch.prompts * 2)).chunk(2)
        return better, worse


def open_data(config: OnlineDPORun, reward: RewardMixture | None) -> PromptSource:
    return PromptSource(load_prompts(config.data.path), config.seed)


def build(
    config: OnlineDPORun,
    data: PromptSource,
    denoiser: Denoiser,
    reward: RewardMixture | None,
    context: Context,
) -> OnlineDPO:
    assert reward is not None  # the configuration requires one
    return OnlineDPO(config.algorithm, config.sampler, denoiser, data, reward, context)
