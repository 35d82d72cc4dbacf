"""What methods on given pictures share: their sizes and latents, and noise drawn by position in the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.config.sizes import Size
from diffalign.data.buckets import Buckets
from diffalign.data.substitutes import Substitutes
from diffalign.models.base import Denoiser
from diffalign.seeding import generator

ENCODE_BATCH = 16


class Shapes:
    """The size of each item's pictures in training: that of its bucket, or the denoiser's for all.

    Args:
        count: items in all.
        buckets: of these items; None: none.
    """

    def __init__(self, count: int, denoiser: Denoiser, buckets: Buckets | None) -> None:
        self._denoiser, self._buckets = denoiser, buckets
        self.groups: Sequence[Sequence[int]] = [range(count)] if buckets is None else buckets.groups
        """Items that may share a batch."""
        self.mates = None if buckets is None else buckets.mates
        """For `Substitutes`: only an item of one size stands in for another."""

    def size(self, index: int) -> Size:
        return self._denoiser.size if self._buckets is None else self._buckets.size(index)

    def told(self, indices: Sequence[int]) -> Tensor | None:
        """`buckets.told` of all pictures of some items [N, 6], item by item; None without buckets."""
        if self._buckets is None:
            return None
        return torch.cat([self._buckets.told(index) for index in indices])


def require_sizes(denoiser: Denoiser, buckets: Buckets | None) -> None:
    """Raises ConfigError where the model cannot take the size of a bucket that has items."""
    for size in [] if buckets is None else buckets.sizes:
        denoiser.require_size(size, "data.buckets")


def say_buckets(described: str, buckets: Buckets | None, batch: int, context: Context) -> None:
    """Say what there is in which bucket, and which of them have less than a batch; without buckets nothing."""
    if buckets is not None:
        context.say(described)
        warning = buckets.warning(batch)
        if warning is not None:
            context.say(warning)


class Latents:
    """Latents of a data set's items, one or several pictures each: encoded once and kept on the CPU, or at each use.

    For an item with an unreadable picture another one stands in, by `Substitutes`.

    Args:
        load: the pictures of an item at a size, [k, 3, height, width] in [0, 1]; raises DataError where one cannot be
            read.
        count: items in all.
        cached: encode all of them now.
        buckets: of these items, which says their sizes; those that are taken together must be of one. None: all are of
            the denoiser's size.
    """

    def __init__(
        self,
        load: Callable[[int, Size], Tensor],
        count: int,
        denoiser: Denoiser,
        context: Context,
        *,
        cached: bool,
        buckets: Buckets | None = None,
    ) -> None:
        self._denoiser, self._poll = denoiser, context.poll
        self.shapes = Shapes(count, denoiser, buckets)
        self._readable = Substitutes(
            lambda index: load(index, self.shapes.size(index)),
            count,
            context.seed,
            context.say,
            self.shapes.mates,
        )
        self._read: set[int] = set()
        self._cached: dict[int, Tensor] | None = None
        if cached:
            with context.meter.phase("encoding"):
                self._cached = {
                    index: latents
                    for group in self.shapes.groups
                    for index, latents in zip(group, self._encode(group), strict=True)
                }

    def index(self, index: int) -> int:
        """The item that is used for `index`: itself, or the one that stands in for it."""
        if index not in self._read:
            self.pictures(index)
        return self._readable.index(index)

    def pictures(self, index: int) -> Tensor:
        """The pictures [k, 3, H, W] of item `index`, or of the one that stands in for it."""
        self._poll()
        pictures = self._readable.load(index)
        self._read.add(index)
        return pictures

    def take(self, indices: Sequence[int]) -> list[Tensor]:
        """Latents of some items, each [k, C, H, W], on the denoiser's device."""
        found = self._encode(indices) if self._cached is None else [self._cached[index] for index in indices]
        return [latents.to(self._denoiser.device) for latents in found]

    def told(self, indices: Sequence[int]) -> Tensor | None:
        """What a network may be told of the sizes of the pictures that `take` gives, see `Shapes.told`."""
        return self.shapes.told([self.index(index) for index in indices])

    @torch.no_grad()
    def _encode(self, indices: Sequence[int]) -> list[Tensor]:
        items: list[Tensor] = []
        for start in range(0, len(indices), ENCODE_BATCH):
            loaded = [self.pictures(index) for index in indices[start : start + ENCODE_BATCH]]
            parts = torch.cat(loaded).split(ENCODE_BATCH)
            latents = torch.cat([self._denoiser.encode_images(part).cpu() for part in parts])
            items += latents.split([len(pictures) for pictures in loaded])
        return items


def draw_noise(
    denoiser: Denoiser,
    seed: int,
    purpose: str,
    positions: Sequence[int],
    shape: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Noise [N, C, H, W] and timesteps [N] for N positions in the run, on the denoiser's device.

    Each depends on (seed, purpose, position) only.

    Args:
        shape: (C, H, W) of the latents; None: the denoiser's own.
    """
    draws = [generator(seed, purpose, position) for position in positions]
    shape = denoiser.latent_shape if shape is None else tuple(shape)
    noise = torch.stack([torch.randn(shape, generator=draw) for draw in draws])
    total = denoiser.schedule.num_timesteps
    t = torch.stack([torch.randint(total, (), generator=draw) for draw in draws])
    return noise.to(denoiser.device), t.to(denoiser.device)
