"""Picture pairs as the network sees them: latents, labels, margins, and where in the schedule each is trained on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.algorithms.latents import Shapes
from diffalign.data.preferences import PairSet
from diffalign.data.substitutes import Substitutes
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import generator

ENCODE_BATCH = 16
TimestepSampling = Literal["uniform", "stratified", "antithetic"]


@dataclass(frozen=True)
class PairBatch:
    """x0_w, x0_l, noise [B, C, H, W] (one noise per pair); t [B]; B prompts; B indices of pairs; probability [B].

    `new_labels`: how many pairs of the whole batch, over all processes, training sees for the first time. `margin` [B]:
    how much better the preferred picture is, for losses that ask. `sizes` [2 B, 6]: what the preferred pictures
    were, then the others, for `Denoiser.with_sizes`; None: as they are.
    """

    x0_w: Tensor
    x0_l: Tensor
    noise: Tensor
    t: Tensor
    prompts: list[str]
    indices: list[int]
    probability: Tensor
    new_labels: int
    weight: float
    margin: Tensor | None = None
    sizes: Tensor | None = None


class LatentPairs:
    """Pairs as latents: encoded once and kept on the CPU, or encoded at each use.

    For a pair with an unreadable picture another one stands in, by `Substitutes`. Where the pairs are sorted into
    buckets, those that are taken together must be of one.
    """

    def __init__(self, pairs: PairSet, denoiser: Denoiser, context: Context, *, cached: bool) -> None:
        self.pairs, self.denoiser, self._poll = pairs, denoiser, context.poll
        self.shapes = Shapes(len(pairs), denoiser, pairs.buckets)
        self._readable = Substitutes(self._read, len(pairs), context.seed, context.say, self.shapes.mates)
        self._cached: dict[int, tuple[Tensor, Tensor]] | None = None
        if cached and len(pairs):
            self._cached = {
                index: (winner, loser)
                for group in self.shapes.groups
                for index, winner, loser in zip(group, *self._encode(group), strict=True)
            }

    def __len__(self) -> int:
        return len(self.pairs)

    def prompt(self, index: int) -> str:
        return self.pairs.prompt(self._readable.index(index))

    def probability(self, index: int) -> float:
        """That the first picture is preferred, see `PairSet.probability`."""
        return self.pairs.probability(self._readable.index(index))

    def margin(self, index: int) -> float:
        """How much better the first picture is, see `PairSet.margin`."""
        return self.pairs.margin(self._readable.index(index))

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        return self.pairs.load(index, self.shapes.size(index))

    def pictures(self, index: int) -> tuple[Tensor, Tensor]:
        """Preferred and rejected picture, each [3, H, W] in [0, 1]."""
        self._poll()
        return self._readable.load(index)

    @torch.no_grad()
    def _encode(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        winners, losers = [], []
        for start in range(0, len(indices), ENCODE_BATCH):
            loaded = [self.pictures(i) for i in indices[start : start + ENCODE_BATCH]]
            pictures = torch.stack([pair[0] for pair in loaded] + [pair[1] for pair in loaded])
            first, second = self.denoiser.encode_images(pictures).cpu().chunk(2)
            winners.append(first)
            losers.append(second)
        return torch.cat(winners), torch.cat(losers)

    def latents(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Preferred and rejected latents, each [len(indices), C, H, W], on the denoiser's device."""
        if self._cached is not None:
            winners, losers = map(torch.stack, zip(*(self._cached[index] for index in indices), strict=True))
        else:
            winners, losers = self._encode(indices)
        return winners.to(self.denoiser.device), losers.to(self.denoiser.device)

    def told(self, indices: Sequence[int]) -> Tensor | None:
        """What a network may be told of the sizes of the pictures of `latents` [2 N, 6], see `Shapes.told`."""
        sizes = self.shapes.told([self._readable.index(index) for index in indices])
        return None if sizes is None else torch.cat([sizes[0::2], sizes[1::2]])


def reward_margins(pairs: LatentPairs, reward: RewardMixture, context: Context) -> list[float]:
    """Calibrated margin of every pair's preferred picture over the other, from the run's rewards.

    A reward r is calibrated to its win rate sigmoid(r - r') against the other picture (CaPO, with a pair as the group),
    so the margin is sigmoid(d) - sigmoid(-d) = tanh(d / 2), in (-1, 1), d the difference of the rewards; their weights
    set its scale. The processes share the pairs.
    """
    count, world = len(pairs), context.world
    rows = [min(row, count - 1) for row in range(context.rank, -(-count // world) * world, world)]
    found: list[Tensor] = []
    with context.meter.phase("rewards"):
        for start in range(0, len(rows), ENCODE_BATCH):
            chunk = rows[start : start + ENCODE_BATCH]
            loaded = [pairs.pictures(row) for row in chunk]
            sizes, differences = _alike(loaded), []
            for places in sizes:
                prompts = [pairs.prompt(chunk[place]) for place in places]
                pictures = torch.stack([loaded[place][which] for which in (0, 1) for place in places])
                first, second = reward(pictures, prompts * 2).total.cpu().chunk(2)
                differences.append(first - second)
            order = torch.tensor([place for places in sizes for place in places]).argsort()
            found.append(torch.tanh(torch.cat(differences)[order] / 2))
    context.meter.count("reward_queries", 2 * count * len(reward.labels))
    everyone = context.gather(torch.cat(found).to(context.device)).cpu()
    margins: list[float] = everyone.view(world, -1).T.flatten()[:count].tolist()
    return margins


def _alike(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Places of the pairs of each size."""
    places: dict[torch.Size, list[int]] = {}
    for place, (first, _) in enumerate(pairs):
        places.setdefault(first.shape, []).append(place)
    return list(places.values())


def draw_timesteps(
    how: TimestepSampling,
    draws: Sequence[torch.Generator],
    positions: Sequence[int],
    update: int,
    total: int,
    seed: int,
) -> Tensor:
    """Timesteps [B], int64 in 0..total-1, each a function of its position in the run.

    Args:
        how: uniform draws each on its own. stratified cuts the schedule into as many parts as an update has pairs and
            gives each pair a part of its own. antithetic gives every second position T - 1 - t of the one before it.
        draws: each position's own generator, for uniform.
        positions: B places in the run; an update is `update` of them in a row.
        total: T, the timesteps to choose from.
        seed: the run's.
    """
    if how == "uniform":
        return torch.stack([torch.randint(total, (), generator=draw) for draw in draws])
    if how == "antithetic":
        return torch.tensor([_mirrored(position, total, seed) for position in positions])
    return torch.tensor([_stratified(position, update, total, seed) for position in positions])


def _mirrored(position: int, total: int, seed: int) -> int:
    t = int(torch.randint(total, (), generator=generator(seed, "timestep", position // 2)))
    return total - 1 - t if position % 2 else t


def _stratified(position: int, update: int, total: int, seed: int) -> int:
    parts = torch.randperm(update, generator=generator(seed, "strata", position // update))
    within = float(torch.rand((), generator=generator(seed, "timestep", position), dtype=torch.float64))
    return min(total - 1, math.floor((int(parts[position % update]) + within) / update * total))


class TimestepBins:
    """Means by part of the schedule, of all that one iteration saw so far on this process.

    A mean over batches would count a batch without a sample of a part as 0, and another with one sample as much as one
    with many; so sums and counts are kept, and a part that saw nothing has no figure.
    """

    COUNT = 4

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.iteration = tuple(names), -1
        self._sums = self._empty()

    def _empty(self) -> Tensor:
        return torch.zeros(len(self.names) + 1, self.COUNT, dtype=torch.float64)

    def begin(self, iteration: int) -> None:
        """Start anew, unless `iteration` is under way already."""
        if iteration != self.iteration:
            self.iteration, self._sums = iteration, self._empty()

    def add(self, t: Tensor, total: int, *values: Tensor) -> None:
        """Values [B], one tensor a name, at timesteps t [B] of `total`; those that are not finite are left out."""
        part = (t * self.COUNT // total).cpu()
        rows = torch.stack(
            [value.detach().double().cpu() for value in values] + [torch.ones(len(t)).double()]
        )
        finite = rows.isfinite().all(dim=0)
        self._sums.index_add_(1, part[finite], rows[:, finite])

    def means(self) -> dict[str, float]:
        """`train/NAME/PART` -> mean, part 0 the least noisy quarter of the schedule."""
        counts = self._sums[-1]
        return {
            f"train/{name}/{part}": float(self._sums[row, part] / counts[part])
            for row, name in enumerate(self.names)
            for part in range(self.COUNT)
            if counts[part]
        }

    def unfinished(self, iteration: int) -> Tensor | None:
        """The sums of `iteration`, where there are any."""
        return self._sums.clone() if iteration == self.iteration and bool(self._sums[-1].any()) else None

    def take_up(self, iteration: int, sums: Tensor) -> None:
        self.iteration, self._sums = iteration, sums.clone()
