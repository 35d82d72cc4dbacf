"""Sample grids while a run goes on: the same prompts and seeds before training and now, the reward under each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffalign.algorithms.base import Context
from diffalign.config import EvaluationConfig
from diffalign.models.base import Denoiser
from diffalign.rewards import RewardMixture
from diffalign.training.evaluation import evaluate, write_grid

PROMPTS_PER_SET = 4
GRID = "before-after.png"


def draw_preview(
    denoiser: Denoiser,
    config: EvaluationConfig,
    reward: RewardMixture,
    context: Context,
    folder: Path,
) -> Path:
    """Draw and score the first prompts of every evaluation set; returns the grid's file, `<folder>/before-after.png`.

    One process draws alone: it meets no other on the way, so that none waits for one whose preview failed.
    """
    alone = replace(context, rank=0, world=1, gather=lambda tensor: tensor)
    few = config.model_copy(update={"prompts_per_set": PROMPTS_PER_SET, "seeds_per_prompt": 1})
    with denoiser.reference():
        before = evaluate(denoiser, few, reward, alone, name="before", folder=folder)
    after = evaluate(denoiser, few, reward, alone, name="after", folder=folder)
    write_grid(before, after, reward.labels[0], folder, seeds_per_prompt=1)
    return folder / GRID
