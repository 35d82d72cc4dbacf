"""Which items each step sees: permutations walked without replacement, as a function of counters.

Position p of the endless walk is item p mod n of the permutation of epoch p div n, and step s takes the next
batch x world positions. Nothing is remembered between calls, so a resumed run continues the same walk. Where items fall
into groups that may not share a batch, each group has such a walk, and `Order` says whose turn it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from diffalign.seeding import generator


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The permutation of 0..n-1 of one epoch: int64 [n]."""
    return _permutation(n, seed, epoch).clone()


def batch_indices(n: int, batch: int, step: int, seed: int, rank: int, world: int) -> list[int]:
    """The `batch` items that process `rank` of `world` sees at global step `step`.

    Over the steps and ranks each item comes once an epoch. A batch may be larger than n, or cross the end of
    an epoch; only then can it hold an item twice.
    """
    if n < 1 or batch < 1 or step < 0 or not 0 <= rank < world:
        raise ValueError(f"no batch for {n=}, {batch=}, {step=}, {rank=}, {world=}")
    start = (step * world + rank) * batch
    indices: list[int] = []
    while len(indices) < batch:
        epoch, offset = divmod(start + len(indices), n)
        taken = _permutation(n, seed, epoch)[offset : offset + batch - len(indices)]
        indices += taken.tolist()
    return indices


def first_seen(n: int, drawn: int, step: int) -> int:
    """How many of n items global step `step` (counting from 0) sees for the first time, all ranks together.

    Args:
        n: items in all.
        drawn: batch x world, the positions of the walk that one step takes.
        step: steps before it have taken step x drawn positions.
    """
    return min(n, (step + 1) * drawn) - min(n, step * drawn)


def batch_positions(batch: int, step: int, rank: int, world: int) -> list[int]:
    """Where in the endless walk the items of `batch_indices` stand.

    What is drawn for a position (noise, timestep) does not depend on the number of processes: N processes of batch B
    see what one of batch N x B sees.
    """
    start = (step * world + rank) * batch
    return list(range(start, start + batch))


@dataclass(frozen=True)
class Order:
    """Batches of items of one group each; all processes together take batch after batch.

    Epoch e ends when every group of n items has given ceil((e + 1) n / batch) batches, so that each item has come
    e + 1 times: the last batch of a group is filled up from the group's own next epoch, and nothing is dropped. Within
    an epoch the groups take turns in random order. Batch b of the run is that of process b mod world at step b div
    world: more processes see the same batches in fewer steps. With one group the batches are those of `batch_indices`.

    Args:
        groups: the items of each group; every group has some.
        batch: items per batch.
        seed: of the order.
    """

    groups: Sequence[Sequence[int]]
    batch: int
    seed: int

    def indices(self, step: int, rank: int, world: int) -> list[int]:
        """The items of process `rank` of `world` at global step `step`."""
        number = step * world + rank
        epoch, turns = self._turns(number)
        place = number - self._begin(epoch)
        group = int(turns[place])
        before = self._batches(group, epoch) + int((turns[:place] == group).sum())
        members = self.groups[group]
        return [members[i] for i in batch_indices(len(members), self.batch, before, self.seed, 0, 1)]

    def seen(self, batches: int) -> int:
        """How many items are in the first `batches` batches of the run, each counted once."""
        epoch, turns = self._turns(batches)
        if epoch > 0:
            return sum(map(len, self.groups))
        given = turns[:batches].bincount(minlength=len(self.groups)).tolist()
        return sum(
            min(len(items), count * self.batch) for items, count in zip(self.groups, given, strict=True)
        )

    def first_seen(self, step: int, world: int) -> int:
        """How many items global step `step` sees for the first time, all processes together."""
        return self.seen((step + 1) * world) - self.seen(step * world)

    def _batches(self, group: int, epochs: int) -> int:
        """How many batches a group gives in so many epochs."""
        return -(-epochs * len(self.groups[group]) // self.batch)

    def _begin(self, epoch: int) -> int:
        """The first batch of an epoch."""
        return sum(self._batches(group, epoch) for group in range(len(self.groups)))

    def _turns(self, number: int) -> tuple[int, Tensor]:
        """The epoch that batch `number` belongs to, and the group of each of its batches."""
        epoch = number * self.batch // sum(map(len, self.groups))  # at most so many: batches are rounded up
        while self._begin(epoch) > number:
            epoch -= 1
        counts = [
            self._batches(group, epoch + 1) - self._batches(group, epoch) for group in range(len(self.groups))
        ]
        return epoch, _shuffled(tuple(counts), self.seed, epoch)


@lru_cache(maxsize=4)
def _shuffled(counts: tuple[int, ...], seed: int, epoch: int) -> Tensor:
    """Each group's number as often as it counts, in random order."""
    turns = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return turns[torch.randperm(len(turns), generator=generator(seed, "turns", epoch))]


@lru_cache(maxsize=32)
def _permutation(n: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))
