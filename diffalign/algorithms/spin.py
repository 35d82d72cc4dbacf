"""Self-play fine-tuning on captioned pictures: SPIN-Diffusion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.algorithms.base import Algorithm, Context
from diffalign.algorithms.latents import Latents, draw_noise
from diffalign.algorithms.snapshots import PolicySnapshot
from diffalign.config import SamplerConfig, SPINConfig, SPINRun
from diffalign.data.images import CaptionedImages
from diffalign.data.order import batch_indices, batch_positions, first_seen
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import squared_error
from diffalign.losses.preference import diffusion_dpo
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.seeding import derive_seed
from diffalign.trajectory import rollout


@dataclass(frozen=True)
class SelfPlayBatch:
    """x0_w (of the data), x0_l (sampled), noise [B, C, H, W], one noise a pair; t [B]; B captions and positions.

    `new_captions`: how many of the whole batch, over all processes, training sees for the first time.
    `new_samples`: how many of x0_l are used for the first time in this generation.
    """

    x0_w: Tensor
    x0_l: Tensor
    noise: Tensor
    t: Tensor
    captions: list[str]
    positions: list[int]
    new_captions: int
    new_samples: int
    weight: float


class SPIN(Algorithm):
    """SPIN-Diffusion: pictures of the data win against those that an earlier policy samples for the same captions.

    A generation is `iterations_per_generation` iterations. At its start the present policy is copied: the copy samples
    the generation's losers and is its reference. A loser is a function of (the copy, seed, generation, picture); they
    are sampled in fixed blocks when they are first needed, kept as latents, and sampled again after a resume. The copy
    itself is in every checkpoint.
    """

    uses_reference = False

    def __init__(
        self,
        config: SPINConfig,
        sampler: SamplerConfig,
        denoiser: Denoiser,
        images: CaptionedImages,
        context: Context,
        *,
        cache_latents: bool = True,
    ) -> None:
        self.config, self.denoiser, self.images, self.context = config, denoiser, images, context
        self.sampler = denoiser.make_sampler(sampler)
        self._latents = Latents(
            lambda index, size: images.load(index, size)[None],
            len(images),
            denoiser,
            context,
            cached=cache_latents,
        )
        self.snapshot = PolicySnapshot(denoiser.trainable_parameters())
        self._generation = -1  # that the snapshot is of
        self._planned = -1  # that the next three are of
        self._first_use: dict[int, int] = {}  # picture -> step
        self._blocks: dict[int, list[int]] = {}  # picture -> pictures that are sampled with it
        self._losers: dict[int, Tensor] = {}

    def updates(self, iteration: int) -> Iterator[list[SelfPlayBatch]]:
        accumulation = self.config.gradient_accumulation
        self._enter(iteration // self.config.iterations_per_generation)
        yield [self._batch(iteration * accumulation + i) for i in range(accumulation)]

    # Losers

    def _enter(self, generation: int) -> None:
        if generation != self._generation:
            self.snapshot.take()
            self._generation = generation
        if generation != self._planned:
            self._plan(generation)

    def _plan(self, generation: int) -> None:
        """Which pictures this process needs in a generation, by first use; so blocks do not depend on a resume."""
        steps = self.config.iterations_per_generation * self.config.gradient_accumulation
        first_use: dict[int, int] = {}
        for step in range(generation * steps, (generation + 1) * steps):
            for index in self._indices(step):
                first_use.setdefault(index, step)
        order, size = list(first_use), self.config.sample_batch_size
        blocks = [order[start : start + size] for start in range(0, len(order), size)]
        self._blocks = {index: block for block in blocks for index in block}
        self._first_use, self._losers, self._planned = first_use, {}, generation

    def _indices(self, step: int) -> list[int]:
        context = self.context
        size = self.config.batch_size
        return batch_indices(len(self.images), size, step, context.seed, context.rank, context.world)

    def _caption(self, index: int) -> str:
        return self.images.caption(self._latents.index(index))

    def _losers_of(self, indices: list[int]) -> Tensor:
        for index in indices:
            if index not in self._losers:
                with self.context.meter.phase("sampling"):
                    self._sample(self._blocks[index])
        return torch.stack([self._losers[index] for index in indices]).to(self.denoiser.device)

    @torch.no_grad()
    def _sample(self, block: list[int]) -> None:
        seeds = [derive_seed(self.context.seed, "spin", self._generation, index) for index in block]
        captions = [self._caption(index) for index in block]
        with self.snapshot.swapped_in():
            conditioning = self.denoiser.encode_prompts(captions)
            steps = rollout(self.denoiser, conditioning, self.sampler, seeds)
            *_, last = self.context.watched(steps)
        self._losers.update(zip(block, last.x_prev.cpu(), strict=True))

    # Learning

    def _batch(self, step: int) -> SelfPlayBatch:
        context, size = self.context, self.config.batch_size
        indices = self._indices(step)
        positions = batch_positions(size, step, context.rank, context.world)
        x0_w, x0_l = torch.cat(self._latents.take(indices)), self._losers_of(indices)
        noise, t = draw_noise(self.denoiser, context.seed, "spin noise", positions)
        captions = [self._caption(index) for index in indices]
        seen = first_seen(len(self.images), size * context.world, step)
        sampled = sum(self._first_use[index] == step for index in set(indices))
        weight = 1 / self.config.gradient_accumulation
        return SelfPlayBatch(x0_w, x0_l, noise, t, captions, positions, seen, sampled, weight)

    def _errors(self, batch: SelfPlayBatch) -> tuple[Tensor, Tensor]:
        """Squared errors [B] on the pictures of the data and on the sampled ones, in one pass."""
        schedule = self.denoiser.schedule
        x0 = torch.cat([batch.x0_w, batch.x0_l])
        noise, t = batch.noise.repeat(2, 1, 1, 1), batch.t.repeat(2)
        conditioning = self.denoiser.encode_prompts(batch.captions * 2)
        prediction = self.denoiser.predict(schedule.add_noise(x0, noise, t), t, conditioning)
        first, second = squared_error(prediction, schedule.target(x0, noise, t)).chunk(2)
        return first, second

    def loss(self, batch: SelfPlayBatch) -> LossOutput:
        meter, world = self.context.meter, self.context.world
        meter.count("training_pictures", 2 * len(batch.captions) * world)
        meter.count("captions", batch.new_captions)
        meter.count("sampled_pictures", batch.new_samples * world)
        with torch.no_grad(), self.snapshot.swapped_in():
            ref_w, ref_l = self._errors(batch)
        err_w, err_l = self._errors(batch)
        return diffusion_dpo(err_w, err_l, ref_w, ref_l, beta=self.config.beta)

    # The loop's other questions

    def metrics(self) -> dict[str, float]:
        return {"spin/generation": float(self._generation)}

    def state_dict(self) -> dict[str, Any]:
        return {"generation": self._generation}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generation, self._planned = state["generation"], -1

    def tensors(self) -> dict[str, Tensor]:
        return self.snapshot.tensors()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.snapshot.load_tensors(tensors)


def open_data(config: SPINRun, reward: RewardMixture | None) -> CaptionedImages:
    return CaptionedImages(config.data)


def build(
    config: SPINRun, data: CaptionedImages, denoiser: Denoiser, reward: RewardMixture | None, context: Context
) -> SPIN:
    per_generation, iterations = config.algorithm.iterations_per_generation, config.training.iterations
    count = -(-iterations // per_generation)
    context.say(
        f"{count} generation{'s' if count > 1 else ''} of self-play, {per_generation} iterations each"
    )
    return SPIN(
        config.algorithm,
        config.sampler,
        denoiser,
        data,
        context,
        cache_latents=config.data.cache_latents,
    )
