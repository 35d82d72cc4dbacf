"""Clipping and standardising several rewards before they are weighed."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from diffalign.config import RewardConfig
from diffalign.rewards import RewardMixture


@pytest.fixture
def functions(tmp_path) -> str:
    """red and green: the mean of that channel, the latter times 100; flat: always 3."""
    file = tmp_path / "mine.py"
    file.write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2))\n"
        "def green(images, prompts):\n    return images[:, 1].mean((1, 2)) * 100\n"
        "def flat(images, prompts):\n    return [3.0] * len(prompts)\n"
    )
    return str(file)


def spec(functions: str, name: str, **options: object) -> RewardConfig:
    return RewardConfig(name=f"{functions}:{name}", label=name, **options)


@pytest.fixture
def images() -> torch.Tensor:
    """Two pictures: red 0 and 1, green 0.1 and 0.3."""
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 1.0
    images[0, 1], images[1, 1] = 0.1, 0.3
    return images


def test_a_clip_bounds_the_total_and_not_the_component(functions, images):
    mixture = RewardMixture([spec(functions, "green", weight=2.0, clip=(0.0, 15.0))])
    scores = mixture(images, ["a", "b"])
    assert_close(scores.components["green"], torch.tensor([10.0, 30.0]))
    assert_close(scores.total, torch.tensor([20.0, 30.0]))


def test_standard_scores_are_weighed(functions, images):
    specs = [spec(functions, "red"), spec(functions, "green", weight=0.5), spec(functions, "flat")]
    mixture = RewardMixture(specs, normalized=True)
    # each of the first two is (-1, 1) in its own standard deviations; what never varies adds nothing
    assert_close(mixture(images, ["a", "b"]).total, torch.tensor([-1.5, 1.5]), atol=1e-4, rtol=0)


def test_a_watched_reward_leaves_the_total_alone(functions, images):
    specs = [spec(functions, "red"), spec(functions, "green", weight=0.0)]
    for normalized in (False, True):
        alone = RewardMixture(specs[:1], normalized=normalized)(images, ["a", "b"])
        watched = RewardMixture(specs, normalized=normalized)(images, ["a", "b"])
        assert_close(watched.total, alone.total)
        assert_close(watched.components["green"], torch.tensor([10.0, 30.0]))


def test_standard_scores_are_those_of_the_pictures_combined(functions, images):
    mixture = RewardMixture([spec(functions, "red")], normalized=True)
    parts = [mixture(images[i : i + 1], ["a"]).components for i in range(2)]
    whole = {"red": torch.cat([part["red"] for part in parts])}
    assert_close(mixture.combine(whole), torch.tensor([-1.0, 1.0]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("clip", [(1.0, 1.0), (2.0, 1.0)])
def test_a_clip_that_is_no_range_is_refused(clip):
    with pytest.raises(ValidationError, match="low below high"):
        RewardConfig(name="shapes", clip=clip)
