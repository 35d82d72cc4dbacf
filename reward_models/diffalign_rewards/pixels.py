"""Rewards without a model: exact gradients, for trying a training run out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import ImageColor
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.rewards import RewardModel


class BrightnessReward(RewardModel):
    """Mean of all channels and pixels, 0 (black) to 1 (white)."""

    name = "brightness"
    range = (0.0, 1.0)
    differentiable = True
    needs_prompt = False
    license = "Apache-2.0"

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean((1, 2, 3))


class ColorReward(RewardModel):
    """Nearness to one colour, 0 to 1: 1 minus the mean squared distance of all channels and pixels.

    Args:
        target: a colour as CSS names it: red, "#ff8000", "rgb(255, 128, 0)".
    """

    name = "color"
    range = (0.0, 1.0)
    differentiable = True
    needs_prompt = False
    license = "Apache-2.0"

    def __init__(self, *, target: str = "red") -> None:
        try:
            channels = ImageColor.getrgb(target)[:3]
        except (ValueError, AttributeError) as error:
            raise RewardError(
                f"{target!r} is not a colour", hint="e.g. red, '#ff8000' or 'rgb(255, 128, 0)'"
            ) from error
        self.target = torch.tensor(channels).view(3, 1, 1) / 255

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return 1 - (images - self.target.to(images.device)).square().mean((1, 2, 3))
