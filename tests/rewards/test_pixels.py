"""Rewards without a model."""

from __future__ import annotations

import pytest
import torch
from diffalign_rewards.pixels import BrightnessReward, ColorReward
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import RewardError
from diffalign.images import to_pil, to_tensor
from diffalign.rewards import RewardModel, load_reward


def test_brightness_is_the_mean_of_all_channels():
    images = torch.stack(
        [
            torch.zeros(3, 2, 2),
            torch.ones(3, 2, 2),
            torch.tensor([0.1, 0.2, 0.6]).view(3, 1, 1).expand(3, 2, 2),
        ]
    )
    assert_close(BrightnessReward()(images, [""] * 3), torch.tensor([0.0, 1.0, 0.3]))


def test_color_is_one_minus_the_mean_squared_distance():
    white = torch.ones(1, 3, 2, 2)
    half_red = torch.tensor([0.5, 0.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    assert_close(ColorReward()(white, [""]), torch.tensor([1 / 3]))  # two of three channels are 1 away
    assert_close(ColorReward()(half_red, [""]), torch.tensor([1 - 0.25 / 3]))
    assert_close(load_reward("color", target="#ffffff")(white, [""]), torch.tensor([1.0]))


@pytest.mark.parametrize("reward", [BrightnessReward(), ColorReward(target="rgb(51, 102, 204)")])
def test_gradient_is_the_derived_one(reward: RewardModel, images: Tensor):
    images.requires_grad_()
    reward(images, [""] * 8).sum().backward()
    count = images[0].numel()
    if isinstance(reward, ColorReward):  # d/dx of 1 - mean((x - t)^2)
        target = torch.tensor([0.2, 0.4, 0.8]).view(3, 1, 1)
        expected = 2 * (target - images.detach()) / count
    else:
        expected = torch.full_like(images, 1 / count)
    assert_close(images.grad, expected)


@pytest.mark.parametrize("reward", [BrightnessReward(), ColorReward()])
def test_pil_and_tensor_scores_are_equal_and_independent_of_the_batch(reward: RewardModel, images: Tensor):
    pictures = to_pil(images)
    scores = reward(pictures, [""] * 8)
    assert_close(reward(to_tensor(pictures), [""] * 8), scores)
    assert_close(torch.cat([reward([picture], [""]) for picture in pictures]), scores)
    low, high = reward.range
    assert ((low <= scores) & (scores <= high)).all()


def test_unknown_colour_is_named():
    with pytest.raises(RewardError, match="'redd' is not a colour"):
        ColorReward(target="redd")
