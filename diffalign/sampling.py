"""Pictures from prompts and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.config import SamplerConfig
from diffalign.errors import ConfigError
from diffalign.models.base import Denoiser
from diffalign.models.diffusers_denoiser import DiffusersDenoiser
from diffalign.trajectory import rollout


def guide_away_from(denoiser: Denoiser, negative: Denoiser, sampler: SamplerConfig) -> None:
    """Let `negative` stand in for the unconditional branch of the guidance of `denoiser` (Diffusion-NPO).

    Raises:
        ConfigError: the sampler does not guide, so the negative would do nothing; or a model that cannot take one.
        CheckpointError: the two do not fit, see `DiffusersDenoiser.guide_away_from`.
    """
    if sampler.guidance_scale == 1:
        raise ConfigError(
            "a negative model has no effect at guidance scale 1",
            why="it takes the place of the prediction without a prompt, which guidance scale 1 does not use",
            hint="give a --guidance-scale other than 1 (5 to 7.5 is usual), or leave the negative out",
        )
    if not isinstance(denoiser, DiffusersDenoiser):
        raise ConfigError(
            f"a {type(denoiser).__name__} takes no negative model", hint="leave the negative out"
        )
    denoiser.guide_away_from(negative)


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: SamplerConfig,
    batch_size: int,
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Pictures [N, 3, H, W] float32 in [0, 1] on the CPU; picture i depends on prompts[i] and seeds[i] only.

    Args:
        prompts, seeds: N each.
        batch_size: pictures per denoiser call; changes memory and speed, not the pictures.
        on_step: called after each denoising step; may raise to end it.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"prompts and seeds are pairs, got {len(prompts)} and {len(seeds)}")
    steps = denoiser.make_sampler(sampler)
    pictures: list[Tensor] = []
    for start in range(0, len(prompts), batch_size):
        rows = slice(start, start + batch_size)
        conditioning = denoiser.encode_prompts(prompts[rows])
        for step in rollout(denoiser, conditioning, steps, seeds[rows]):
            latents = step.x_prev
            if on_step is not None:
                on_step()
        pictures.append(denoiser.decode(latents).cpu())
    return torch.cat(pictures) if pictures else torch.empty(0, 3, *denoiser.size)
