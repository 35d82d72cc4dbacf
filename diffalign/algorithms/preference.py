"""Preference optimisation on picture pairs: Diffusion-DPO and every other loss of `losses/pair_table.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.latents import require_sizes, say_buckets
from diffalign.algorithms.pairs import (
    LatentPairs,
    PairBatch,
    TimestepBins,
    draw_timesteps,
    reward_margins,
)
from diffalign.config import DPOConfig, DPORun
from diffalign.data.buckets import bucket_sizes
from diffalign.data.order import Order, batch_positions
from diffalign.data.preferences import PreferencePairs
from diffalign.errors import DataError
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import squared_error
from diffalign.losses.pair_table import AVERAGED
from diffalign.losses.safeguard import keep_the_winner
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import generator, sample_noise

__all__ = ["DPO", "LatentPairs", "PairBatch", "build", "open_data"]

Errors = tuple[Tensor, Tensor]
"""Squared errors [B] on the preferred and on the rejected pictures."""


class DPO(Algorithm):
    """A pair loss on `pairs`; policy and reference see the same latents, noise and timesteps.

    Args:
        reward: scores the pictures once, for a loss that needs margins and pairs that have none.
    """

    def __init__(
        self,
        config: DPOConfig,
        denoiser: Denoiser,
        pairs: PreferencePairs,
        context: Context,
        *,
        cache_latents: bool = True,
        reward: RewardMixture | None = None,
    ) -> None:
        self.config, self.denoiser, self.context = config, denoiser, context
        self.entry = config.pair_loss
        self.uses_reference = self.entry.needs_reference
        self._settings = self.entry.settings(config.beta, config.loss_options)
        self._function = self.entry.load()
        with context.meter.phase("encoding"):
            self.train_pairs = LatentPairs(pairs.train, denoiser, context, cached=cache_latents)
            self.validation_pairs = LatentPairs(pairs.validation, denoiser, context, cached=cache_latents)
        self._order = Order(self.train_pairs.shapes.groups, config.batch_size, context.seed)
        self._margins: list[float] | None = None
        if "margin" in self.entry.extras and not pairs.train.has_margins:
            if reward is None:
                raise ValueError(f"{config.loss} needs margins: pairs that have them, or a reward")
            self._margins = reward_margins(self.train_pairs, reward, context)
        self._reference_errors: dict[int, Errors] = {}
        self._bins = TimestepBins(("winner_drift" if self.uses_reference else "winner_error", "accuracy"))

    def updates(self, iteration: int) -> Iterator[list[PairBatch]]:
        self._bins.begin(iteration)
        accumulation = self.config.gradient_accumulation
        yield [self._batch(iteration * accumulation + i) for i in range(accumulation)]

    def _batch(self, step: int) -> PairBatch:
        context, size = self.context, self.config.batch_size
        indices = self._order.indices(step, context.rank, context.world)
        positions = batch_positions(size, step, context.rank, context.world)
        draws = [generator(context.seed, "dpo", position) for position in positions]
        x0_w, x0_l = self.train_pairs.latents(indices)
        noise = torch.stack([torch.randn(x0_w.shape[1:], generator=draw) for draw in draws])
        update = size * context.world * self.config.gradient_accumulation
        trained = self.config.trained_timesteps(self.denoiser.schedule.num_timesteps)
        how = self.config.timestep_sampling
        t = trained.start + draw_timesteps(how, draws, positions, update, len(trained), context.seed)
        new = self._order.first_seen(step, context.world)
        weight = 1 / self.config.gradient_accumulation
        margin = self._margin(indices) if "margin" in self.entry.extras else None
        return self._collate(self.train_pairs, indices, x0_w, x0_l, noise, t, new, weight, margin)

    def _margin(self, indices: list[int]) -> Tensor:
        margins = self._margins
        found = [self.train_pairs.margin(i) if margins is None else margins[i] for i in indices]
        return torch.tensor(found, device=self.denoiser.device)

    def _collate(
        self,
        source: LatentPairs,
        indices: list[int],
        x0_w: Tensor,
        x0_l: Tensor,
        noise: Tensor,
        t: Tensor,
        new: int,
        weight: float,
        margin: Tensor | None = None,
    ) -> PairBatch:
        device = self.denoiser.device
        prompts = [source.prompt(i) for i in indices]
        probability = torch.tensor([source.probability(i) for i in indices], device=device)
        noise, t, sizes = noise.to(device), t.to(device), source.told(indices)
        return PairBatch(x0_w, x0_l, noise, t, prompts, indices, probability, new, weight, margin, sizes)

    def _predict(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Predictions [B, C, H, W] on the preferred and on the rejected pictures, in one pass."""
        x0 = torch.cat([batch.x0_w, batch.x0_l])
        noise, t = batch.noise.repeat(2, 1, 1, 1), batch.t.repeat(2)
        conditioning = self.denoiser.with_sizes(self.denoiser.encode_prompts(batch.prompts * 2), batch.sizes)
        x = self.denoiser.schedule.add_noise(x0, noise, t)
        winners, losers = self.denoiser.predict(x, t, conditioning).chunk(2)
        return winners, losers

    def _targets(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        target = self.denoiser.schedule.target
        return target(batch.x0_w, batch.noise, batch.t), target(batch.x0_l, batch.noise, batch.t)

    def loss(self, batch: PairBatch) -> LossOutput:
        self.context.meter.count("training_pictures", 2 * len(batch.prompts) * self.context.world)
        self.context.meter.count("preference_labels", batch.new_labels)
        targets, policy = self._targets(batch), self._predict(batch)
        reference = None
        if self.uses_reference:
            with torch.no_grad(), self.denoiser.reference():
                reference = self._predict(batch)

        def evaluate(winners: Tensor, losers: Tensor) -> LossOutput:
            return self._pair_loss(batch, (winners, losers), reference, targets)

        if self.config.safeguard is None:
            out = evaluate(*policy)
        else:
            out = keep_the_winner(evaluate, *policy, targets[0], mu=self.config.safeguard)
        with torch.no_grad():
            self._count_by_timestep(batch, policy, reference, targets)
        return out

    def _pair_loss(
        self,
        batch: PairBatch,
        policy: tuple[Tensor, Tensor],
        reference: tuple[Tensor, Tensor] | None,
        targets: tuple[Tensor, Tensor],
    ) -> LossOutput:
        frozen = (None, None) if reference is None else _errors(reference, targets)
        extras: dict[str, Any] = {}
        if "probability" in self.entry.extras:
            extras["probability"] = batch.probability
        if "margin" in self.entry.extras:
            extras["margin"] = batch.margin
        if "distance_w" in self.entry.extras and reference is not None:
            extras["distance_w"] = squared_error(policy[0], reference[0])
        out: LossOutput = self._function(*_errors(policy, targets), *frozen, **self._settings, **extras)
        return out

    def _count_by_timestep(
        self,
        batch: PairBatch,
        policy: tuple[Tensor, Tensor],
        reference: tuple[Tensor, Tensor] | None,
        targets: tuple[Tensor, Tensor],
    ) -> None:
        own_w, own_l = _errors(policy, targets)
        if reference is not None:
            frozen_w, frozen_l = _errors(reference, targets)
            own_w, own_l = own_w - frozen_w, own_l - frozen_l
        self._bins.add(batch.t, self.denoiser.schedule.num_timesteps, own_w, _ordered(own_l - own_w))

    def metrics(self) -> dict[str, float]:
        """`train/winner_drift/0` to `/3` and `train/accuracy/0` to `/3`: by quarter of the schedule, 0 the least noisy.

        A quarter that the iteration drew nothing from has no figure. Without a reference, `winner_error` instead of
        `winner_drift`.
        """
        return self._bins.means()

    def validate(self, iteration: int) -> dict[str, float]:
        """Implicit accuracy on held-out pairs, with noise and timesteps fixed for the whole run.

        The share of (pair, timestep) at which the policy improves on its reference more for the preferred picture
        than for the rejected one; an exact tie, as before any update, counts half. `winner_drift` is how much the
        policy's error on the preferred pictures is above the reference's. Without a reference, the errors themselves
        are compared, and `winner_error` is the policy's.
        """
        every = self.config.validation_every
        if not every or not len(self.validation_pairs) or (iteration and iteration % every):
            return {}
        with self.context.meter.phase("validation"), torch.no_grad():
            measured = [self._validation_errors(chunk) for chunk in self._validation_chunks()]
        own_w, own_l = (torch.cat(errors) for errors in zip(*measured, strict=True))
        margin = own_l - own_w
        return {
            "validation/accuracy": float(_ordered(margin).double().mean()),
            "validation/margin": float(margin.mean()),
            f"validation/{'winner_drift' if self.uses_reference else 'winner_error'}": float(own_w.mean()),
        }

    def _validation_chunks(self) -> list[list[int]]:
        size = self.config.batch_size
        return [
            list(group[i : i + size])
            for group in self.validation_pairs.shapes.groups
            for i in range(0, len(group), size)
        ]

    def _validation_errors(self, indices: list[int]) -> Errors:
        """Errors, minus the reference's where there is one, of `indices` at every fixed timestep, flattened."""
        count, total = self.config.validation_timesteps, self.denoiser.schedule.num_timesteps
        x0_w, x0_l = self.validation_pairs.latents(indices)
        winners, losers = [], []
        for k in range(count):
            self.context.poll()
            t = torch.full((len(indices),), int((k + 0.5) * total / count))
            noise = sample_noise(x0_w.shape[1:], indices, "validation", self.context.seed, k)
            batch = self._collate(self.validation_pairs, indices, x0_w, x0_l, noise, t, 0, 1.0)
            own_w, own_l = _errors(self._predict(batch), self._targets(batch))
            if self.uses_reference:
                frozen_w, frozen_l = self._frozen_errors(batch, indices[0] * count + k)
                own_w, own_l = own_w - frozen_w, own_l - frozen_l
            winners.append(own_w)
            losers.append(own_l)
        return torch.cat(winners), torch.cat(losers)

    def _frozen_errors(self, batch: PairBatch, key: int) -> Errors:
        """The reference's errors, computed once."""
        if key not in self._reference_errors:
            with self.denoiser.reference():
                self._reference_errors[key] = _errors(self._predict(batch), self._targets(batch))
        return self._reference_errors[key]

    def unfinished(self, iteration: int) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What the figures by timestep have seen of an iteration that is cut."""
        sums = self._bins.unfinished(iteration)
        return None if sums is None else ({"by_timestep": sums}, {"iteration": iteration})

    def take_up(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self._bins.take_up(state["iteration"], tensors["by_timestep"])


def _errors(predictions: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Errors:
    return squared_error(predictions[0], targets[0]), squared_error(predictions[1], targets[1])


def _ordered(margin: Tensor) -> Tensor:
    """1 where the margin is positive, 0 where negative, 0.5 at an exact tie."""
    return (margin > 0).float() + 0.5 * (margin == 0).float()


def open_data(config: DPORun, reward: RewardMixture | None) -> PreferencePairs:
    sizes = bucket_sizes(config.data.buckets, config.model.resolution)
    pairs = PreferencePairs(config.data, config.algorithm.ties, sizes)
    scored = any(entry.weight for entry in config.rewards)
    if "margin" in config.algorithm.pair_loss.extras and not pairs.train.has_margins and not scored:
        raise DataError(
            f"the pairs have no margins, which the loss {config.algorithm.loss} regresses on",
            where=config.data.path,
            why="there is no column margin, and no reward of the run has a weight to compute them with",
            hint="add a column margin (calibrated reward of picture 0, or of the chosen one, minus the other's, in "
            "[-1, 1]), or list rewards",
        )
    return pairs


def build(
    config: DPORun, data: PreferencePairs, denoiser: Denoiser, reward: RewardMixture | None, context: Context
) -> DPO:
    require_sizes(denoiser, data.train.buckets)
    require_sizes(denoiser, data.validation.buckets)
    say_buckets(data.describe(), data.train.buckets, config.algorithm.batch_size, context)
    context.say(_strength(config.algorithm, math.prod(denoiser.latent_shape)))
    cache = config.data.cache_latents
    return DPO(config.algorithm, denoiser, data, context, cache_latents=cache, reward=reward)


def _strength(config: DPOConfig, elements: int) -> str:
    """The loss and its numbers, with their units."""
    entry = config.pair_loss
    settings = entry.settings(config.beta, config.loss_options)
    beta = settings.pop("beta")
    unit = entry.unit
    if unit == AVERAGED:
        unit += f"; for sums over the {elements:,} elements of a latent it is {beta / elements:.3g}"
    others = "".join(f", {name} {value:g}" for name, value in settings.items())
    guard = "" if config.safeguard is None else f", safeguard {config.safeguard:g}"
    return f"loss {config.loss}: beta {beta:g} ({unit}){others}{guard}"
