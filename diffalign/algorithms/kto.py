"""Preference optimisation on single pictures that people liked or not: Diffusion-KTO."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.latents import Latents, draw_noise, require_sizes, say_buckets
from diffalign.config import KTOConfig, KTORun
from diffalign.data.buckets import Buckets, bucket_sizes
from diffalign.data.labelled import LabelledImages
from diffalign.data.order import Order, batch_positions
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import squared_error
from diffalign.losses.unpaired import diffusion_kto, kto_reference_point
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture

UNBALANCED = 4.0
"""Weight of one kind of pictures over the other from which the user is told."""


@dataclass(frozen=True)
class LabelledBatch:
    """x0, noise [B, C, H, W]; t [B]; desirable [B] bool; B captions; B positions in the run, which seed each draw.

    `reference_point`: a scalar, of the whole update; None where this batch is the update, on all processes.
    `new_labels`: how many labels of the whole batch, over all processes, training sees for the first time. `sizes`
    [B, 6]: what the pictures were, for `Denoiser.with_sizes`; None: as they are.
    """

    x0: Tensor
    noise: Tensor
    t: Tensor
    desirable: Tensor
    captions: list[str]
    positions: list[int]
    reference_point: Tensor | None
    new_labels: int
    weight: float
    sizes: Tensor | None = None


class KTO(Algorithm):
    """Diffusion-KTO on `images`; policy and reference see the same latents, noise and timesteps.

    The reference point is a mean over all pictures of an update, whatever process and batch they are in, so that
    neither changes the update.
    """

    uses_reference = True

    def __init__(
        self,
        config: KTOConfig,
        denoiser: Denoiser,
        images: LabelledImages,
        context: Context,
        *,
        cache_latents: bool = True,
        buckets: Buckets | None = None,
    ) -> None:
        self.config, self.denoiser, self.images, self.context = config, denoiser, images, context
        self._latents = Latents(
            lambda index, size: images.load(index, size)[None],
            len(images),
            denoiser,
            context,
            cached=cache_latents,
            buckets=buckets,
        )
        self._order = Order(self._latents.shapes.groups, config.batch_size, context.seed)
        warning = imbalance(config, images.labels)
        if warning is not None:
            context.say(warning)

    def updates(self, iteration: int) -> Iterator[list[LabelledBatch]]:
        accumulation = self.config.gradient_accumulation
        batches = [self._batch(iteration * accumulation + i) for i in range(accumulation)]
        if accumulation > 1:
            with self.context.meter.phase("reference point"):
                point = self._point_of_update(batches)
            batches = [replace(batch, reference_point=point) for batch in batches]
        yield batches

    def _batch(self, step: int) -> LabelledBatch:
        context, size, images = self.context, self.config.batch_size, self.images
        indices = self._order.indices(step, context.rank, context.world)
        positions = batch_positions(size, step, context.rank, context.world)
        x0 = torch.cat(self._latents.take(indices))
        noise, t = draw_noise(self.denoiser, context.seed, "kto", positions, x0.shape[1:])
        used = [self._latents.index(index) for index in indices]
        desirable = torch.tensor([images.labels[index] for index in used], device=self.denoiser.device)
        captions = [images.caption(index) for index in used]
        weight = 1 / self.config.gradient_accumulation
        new = self._labels_until(step + 1) - self._labels_until(step)
        sizes = self._latents.told(indices)
        return LabelledBatch(x0, noise, t, desirable, captions, positions, None, new, weight, sizes)

    def _labels_until(self, step: int) -> int:
        """Labels seen in the first `step` batches of all processes."""
        return self._order.seen(step * self.context.world) // self.images.pictures_per_label

    def _errors(self, batch: LabelledBatch) -> Tensor:
        schedule = self.denoiser.schedule
        x = schedule.add_noise(batch.x0, batch.noise, batch.t)
        conditioning = self.denoiser.with_sizes(self.denoiser.encode_prompts(batch.captions), batch.sizes)
        prediction = self.denoiser.predict(x, batch.t, conditioning)
        return squared_error(prediction, schedule.target(batch.x0, batch.noise, batch.t))

    def _reference_errors(self, batch: LabelledBatch) -> Tensor:
        with torch.no_grad(), self.denoiser.reference():
            return self._errors(batch)

    def _reference_point(self, err: Tensor, ref: Tensor) -> Tensor:
        """Of the errors of this process and all others."""
        errors = self.context.gather(torch.stack([err.detach(), ref], dim=1))
        return kto_reference_point(errors[:, 0], errors[:, 1], beta=self.config.beta)

    @torch.no_grad()
    def _point_of_update(self, batches: list[LabelledBatch]) -> Tensor:
        pairs = [
            (self._errors(batch), self._reference_errors(batch)) for batch in self.context.watched(batches)
        ]
        return self._reference_point(
            torch.cat([err for err, _ in pairs]), torch.cat([ref for _, ref in pairs])
        )

    def loss(self, batch: LabelledBatch) -> LossOutput:
        self.context.meter.count("training_pictures", len(batch.captions) * self.context.world)
        self.context.meter.count("preference_labels", batch.new_labels)
        ref, err = self._reference_errors(batch), self._errors(batch)
        point = batch.reference_point
        if point is None:
            point = self._reference_point(err, ref)
        return diffusion_kto(
            err,
            ref,
            batch.desirable,
            beta=self.config.beta,
            reference_point=point,
            desirable_weight=self.config.desirable_weight,
            undesirable_weight=self.config.undesirable_weight,
        )


def imbalance(config: KTOConfig, labels: list[bool]) -> str | None:
    """What to tell the user where one kind of pictures weighs far more than the other; else None."""
    liked = sum(labels)
    disliked = len(labels) - liked
    ratio = config.desirable_weight * liked / (config.undesirable_weight * disliked)
    if 1 / UNBALANCED <= ratio <= UNBALANCED:
        return None
    balanced = config.desirable_weight * liked / disliked
    return (
        f"warning: {liked:,} liked and {disliked:,} disliked pictures weigh {ratio:.2g} to 1; "
        f"algorithm.undesirable_weight {balanced:.3g} would balance them"
    )


def open_data(config: KTORun, reward: RewardMixture | None) -> LabelledImages:
    return LabelledImages(config.data, bucket_sizes(config.data.buckets, config.model.resolution))


def build(
    config: KTORun, data: LabelledImages, denoiser: Denoiser, reward: RewardMixture | None, context: Context
) -> KTO:
    require_sizes(denoiser, data.buckets)
    say_buckets(data.describe(), data.buckets, config.algorithm.batch_size, context)
    return KTO(
        config.algorithm,
        denoiser,
        data,
        context,
        cache_latents=config.data.cache_latents,
        buckets=data.buckets,
    )
