"""Supervised fine-tuning on captioned pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.latents import Latents, require_sizes, say_buckets
from diffalign.algorithms.points import PointBatch, Points, join
from diffalign.config import SFTConfig, SFTRun
from diffalign.data.buckets import bucket_sizes
from diffalign.data.images import CaptionedImages
from diffalign.data.order import Order, batch_positions
from diffalign.losses.base import LossOutput
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import derive_seed


class CaptionedLatents(Latents):
    """Latents of captioned pictures; an unreadable one is replaced with its caption."""

    def __init__(
        self, images: CaptionedImages, denoiser: Denoiser, context: Context, *, cached: bool
    ) -> None:
        super().__init__(
            lambda index, size: images.load(index, size)[None],
            len(images),
            denoiser,
            context,
            cached=cached,
            buckets=images.buckets,
        )
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def caption(self, index: int) -> str:
        """Of the picture that is used for `index`."""
        return self._images.caption(self.index(index))

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Latents [N, C, H, W] on the denoiser's device."""
        return torch.cat(self.take(indices))


class SFT(Algorithm):
    """Denoising loss on `images`, and on those of a prior; see `SFTConfig` for what each option does."""

    uses_reference = False

    def __init__(
        self,
        config: SFTConfig,
        denoiser: Denoiser,
        images: CaptionedImages,
        context: Context,
        *,
        cache_latents: bool = True,
        prior: CaptionedImages | None = None,
    ) -> None:
        self.config, self.context = config, context
        self._points = Points(config, denoiser, context, "sft")
        self._pictures = CaptionedLatents(images, denoiser, context, cached=cache_latents)
        self._order = Order(self._pictures.shapes.groups, config.batch_size, context.seed)
        self._prior: CaptionedLatents | None = None
        if prior is not None:
            self._prior_points = Points(config, denoiser, context, "prior")
            self._prior = CaptionedLatents(prior, denoiser, context, cached=config.prior.cache_latents)
            seed = derive_seed(context.seed, "prior")
            self._prior_order = Order(self._prior.shapes.groups, config.batch_size, seed)

    def updates(self, iteration: int) -> Iterator[list[PointBatch]]:
        accumulation = self.config.gradient_accumulation
        yield [self._batch(iteration * accumulation + i) for i in range(accumulation)]

    def _batch(self, step: int) -> PointBatch:
        batch = self._batch_of(self._pictures, self._order, self._points, step)
        if self._prior is None:
            return batch
        prior = self._batch_of(self._prior, self._prior_order, self._prior_points, step)
        return join(batch, prior, self.config.prior.weight)

    def _batch_of(self, pictures: CaptionedLatents, order: Order, points: Points, step: int) -> PointBatch:
        context = self.context
        indices = order.indices(step, context.rank, context.world)
        x0 = pictures.batch(indices)
        return points.batch(
            x0,
            [pictures.caption(index) for index in indices],
            batch_positions(self.config.batch_size, step, context.rank, context.world),
            new_captions=order.first_seen(step, context.world),
            weight=1 / self.config.gradient_accumulation,
            sizes=pictures.told(indices),
        )

    def loss(self, batch: PointBatch) -> LossOutput:
        return self._points.loss(batch)


@dataclass(frozen=True)
class SFTData:
    """The pictures to learn from, and those of the prior."""

    images: CaptionedImages
    prior: CaptionedImages | None

    def describe(self) -> str:
        """What there is, counted."""
        words = self.images.describe()
        return words if self.prior is None else f"{words}, and {len(self.prior):,} of a prior"


def open_data(config: SFTRun, reward: RewardMixture | None) -> SFTData:
    prior, sizes = config.algorithm.prior.images, bucket_sizes(config.data.buckets, config.model.resolution)
    return SFTData(CaptionedImages(config.data, sizes), None if prior is None else CaptionedImages(prior))


def build(
    config: SFTRun, data: SFTData, denoiser: Denoiser, reward: RewardMixture | None, context: Context
) -> SFT:
    require_sizes(denoiser, data.images.buckets)
    say_buckets(data.describe(), data.images.buckets, config.algorithm.batch_size, context)
    return SFT(
        config.algorithm,
        denoiser,
        data.images,
        context,
        cache_latents=config.data.cache_latents,
        prior=data.prior,
    )
