"""Rewards of one mixture that share a backbone share its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.config import RewardConfig
from diffalign.images import to_pil
from diffalign.rewards import RewardMixture


@pytest.fixture
def mixture(clip_folder: Path, head_file: Path) -> RewardMixture:
    clip = {"checkpoint": str(clip_folder)}
    return RewardMixture(
        [
            RewardConfig(name="clip", options=clip),
            RewardConfig(name="aesthetic", weight=0.1, options=clip | {"head": str(head_file)}),
        ]
    )


@pytest.fixture
def forwards(mixture: RewardMixture) -> Iterator[list[int]]:
    """Batch sizes of the image tower's forward passes."""
    calls: list[int] = []
    visual = mixture.rewards["clip"].backbone.model.visual
    hook = visual.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    yield calls
    hook.remove()


@pytest.mark.parametrize("as_pil", [False, True])
def test_two_rewards_cost_one_forward_pass(
    mixture: RewardMixture, forwards: list[int], images: Tensor, prompts: list[str], as_pil: bool
):
    batch = to_pil(images) if as_pil else images
    for reward in mixture.rewards.values():
        reward.batch_size = 3
    scores = mixture(batch, prompts)
    assert forwards == [3, 3, 2]
    for label, reward in mixture.rewards.items():
        assert_close(scores.components[label], reward(batch, prompts))
    assert forwards == [3, 3, 2] * 3  # alone, each does its own


def test_nothing_is_remembered_from_one_call_to_the_next(
    mixture: RewardMixture, forwards: list[int], images: Tensor, prompts: list[str]
):
    before = mixture(images, prompts).total
    images.copy_(images.flip(0))  # in place: same tensor, other pictures
    after = mixture(images, prompts).total
    assert len(forwards) == 2
    assert not torch.allclose(before, after)


def test_every_component_owns_its_graph(
    mixture: RewardMixture, forwards: list[int], images: Tensor, prompts: list[str]
):
    components = mixture(images.requires_grad_(), prompts).components
    components["clip"].sum().backward()
    components["aesthetic"].sum().backward()
    assert len(forwards) == 2


def test_pickscore_clip_and_clip_iqa_of_one_model_cost_one_forward_pass(
    transformers_clip_folder: Path, images: Tensor, prompts: list[str]
):
    options = {"checkpoint": str(transformers_clip_folder)}
    names = ["pickscore", "clip", "clip_iqa"]
    mixture = RewardMixture([RewardConfig(name=name, options=options) for name in names])
    backbones = {id(mixture.rewards[name].backbone) for name in names}
    assert len(backbones) == 1
    passes: list[int] = []
    vision = mixture.rewards["clip"].backbone.model.vision_model
    hook = vision.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    scores = mixture(images, prompts).components
    hook.remove()
    assert passes == [8]
    scale = mixture.rewards["clip"].backbone.logit_scale
    assert_close(scores["pickscore"], scale * scores["clip"])


def test_another_precision_or_preprocessing_is_another_model(clip_folder: Path):
    options = {"checkpoint": str(clip_folder)}
    specs = [
        RewardConfig(name="clip", options=options),
        RewardConfig(name="clip", label="half", options=options | {"dtype": "bfloat16"}),
        RewardConfig(name="hpsv2", options=options),
    ]
    mixture = RewardMixture(specs)
    assert len({id(reward.backbone) for reward in mixture.rewards.values()}) == 3
