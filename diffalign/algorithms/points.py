"""Points on the forward path: what is drawn for a picture's place in the run, and the denoising loss there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.algorithms.base import Context
from diffalign.config.supervised import DenoisingConfig
from diffalign.losses.base import LossOutput
from diffalign.losses.denoising import denoising, scheduled_delta
from diffalign.losses.weighting import loss_weight
from diffalign.models.base import Denoiser
from diffalign.seeding import generator
from diffalign.timesteps import discretise, quantile


@dataclass(frozen=True)
class PointBatch:
    """B pictures as points x_t = alpha x0 + sigma input_noise.

    Args:
        x0, noise, input_noise: [B, C, H, W]; `noise` is what the network is asked for.
        t: [B]; captions: B, some dropped; positions: B places in the run, which seed each draw.
        importance: [B] factor of each picture's loss; None: 1.
        new_captions: how many of the whole batch, over all processes, training sees for the first time.
        sizes: [B, 6] what the pictures were, for `Denoiser.with_sizes`; None: as they are.
    """

    x0: Tensor
    noise: Tensor
    input_noise: Tensor
    t: Tensor
    captions: list[str]
    positions: list[int]
    importance: Tensor | None
    new_captions: int
    weight: float
    sizes: Tensor | None = None


class Points:
    """Draws points for pictures, as a function of (seed, purpose, position) each, and takes their loss.

    Args:
        purpose: keeps draws of different sets of positions apart.
    """

    def __init__(self, config: DenoisingConfig, denoiser: Denoiser, context: Context, purpose: str) -> None:
        self.config, self.denoiser, self.context, self.purpose = config, denoiser, context, purpose

    def batch(
        self,
        x0: Tensor,
        captions: Sequence[str],
        positions: list[int],
        *,
        importance: Tensor | None = None,
        new_captions: int = 0,
        weight: float = 1.0,
        sizes: Tensor | None = None,
    ) -> PointBatch:
        """The points of pictures x0 [B, C, H, W] on the denoiser's device, with captions, at B positions."""
        config, device = self.config, self.denoiser.device
        noise, seen, t, kept = [], [], [], []
        for position, caption in zip(positions, captions, strict=True):
            draw = generator(self.context.seed, self.purpose, position)
            noise.append(torch.randn(x0.shape[1:], generator=draw))
            t.append(self._timestep(draw))
            if config.noise_offset:
                noise[-1] += config.noise_offset * torch.randn(len(noise[-1]), 1, 1, generator=draw)
            dropped = bool(torch.rand((), generator=draw) < config.caption_dropout)
            kept.append("" if dropped else caption)
            if config.input_perturbation:
                further = torch.randn(x0.shape[1:], generator=draw)
                seen.append(noise[-1] + config.input_perturbation * further)
        asked = torch.stack(noise).to(device)
        return PointBatch(
            x0,
            asked,
            torch.stack(seen).to(device) if seen else asked,
            torch.stack(t).to(device),
            kept,
            positions,
            None if importance is None else importance.to(device),
            new_captions,
            weight,
            sizes,
        )

    def _timestep(self, draw: torch.Generator) -> Tensor:
        config, total = self.config, self.denoiser.schedule.num_timesteps
        if config.timestep_density == "uniform" and config.timestep_shift == 1:
            return torch.randint(total, (), generator=draw)
        time = quantile(
            torch.rand((), generator=draw, dtype=torch.float64),
            config.timestep_density,
            logit_mean=config.logit_mean,
            logit_std=config.logit_std,
            mode_scale=config.mode_scale,
            shift=config.timestep_shift,
        )
        return discretise(time, total)

    def loss(self, batch: PointBatch) -> LossOutput:
        """The denoising loss of a batch, counted."""
        self.context.meter.count("training_pictures", len(batch.captions) * self.context.world)
        self.context.meter.count("captions", batch.new_captions)
        config, schedule = self.config, self.denoiser.schedule
        x = schedule.add_noise(batch.x0, batch.input_noise, batch.t)
        conditioning = self.denoiser.with_sizes(self.denoiser.encode_prompts(batch.captions), batch.sizes)
        prediction = self.denoiser.predict(x, batch.t, conditioning)
        snr, weight, delta = schedule.snr(batch.t), batch.importance, None
        if config.weighting != "none":
            level = loss_weight(
                snr,
                schedule.prediction_type,
                config.weighting,
                min_snr_gamma=5.0 if config.min_snr_gamma is None else config.min_snr_gamma,
                p2_gamma=1.0 if config.p2_gamma is None else config.p2_gamma,
                p2_k=1.0 if config.p2_k is None else config.p2_k,
            )
            weight = level if weight is None else weight * level
        if config.huber_delta is not None:
            time = batch.t / schedule.num_timesteps
            delta = scheduled_delta(config.huber_delta, config.huber_schedule, snr, time)
        return denoising(prediction, schedule.target(batch.x0, batch.noise, batch.t), weight, delta=delta)


def join(first: PointBatch, second: PointBatch, factor: float) -> PointBatch:
    """Two batches of one size as one, whose loss is that of the first plus `factor` times that of the second."""
    size = len(first.captions)
    if len(second.captions) != size:
        raise ValueError(f"batches of one size are joined, got {size} and {len(second.captions)}")
    importance = torch.tensor([2.0] * size + [2.0 * factor] * size, device=first.t.device)
    return PointBatch(
        torch.cat([first.x0, second.x0]),
        torch.cat([first.noise, second.noise]),
        torch.cat([first.input_noise, second.input_noise]),
        torch.cat([first.t, second.t]),
        first.captions + second.captions,
        first.positions + second.positions,
        importance,
        first.new_captions + second.new_captions,
        first.weight,
    )
