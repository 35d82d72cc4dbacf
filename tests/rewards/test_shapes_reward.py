"""The verifier as a reward."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffalign_rewards.shapes import ShapesAccuracy, ShapesReward
from PIL import Image
from torch.testing import assert_close

from diffalign.data.shapes import draw_prompts, parse_caption, render
from diffalign.data.shapes_verifier import verify
from diffalign.errors import DataError
from diffalign.images import to_tensor


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Image.Image, str]]:
    """Renders of twelve scenes, and a caption of each."""
    captions = draw_prompts(12, "train", seed=0)
    rng = np.random.default_rng(0)
    return [(render(parse_caption(caption), rng), caption) for caption in captions]


def test_scores_are_the_verifiers(scenes):
    pictures, captions = [p for p, _ in scenes], [c for _, c in scenes]
    wrong = captions[1:] + captions[:1]
    verdicts = [verify(picture, caption) for picture, caption in zip(pictures, wrong, strict=True)]
    partial = torch.tensor([verdict.score for verdict in verdicts])
    assert_close(ShapesReward()(pictures, wrong), partial)
    assert_close(ShapesReward()(to_tensor(pictures), wrong), partial)
    assert_close(ShapesAccuracy()(pictures, wrong), torch.tensor([float(v.correct) for v in verdicts]))
    assert (ShapesAccuracy()(to_tensor(pictures), captions) == 1).all()
    assert (partial < 1).any()


def test_prompt_outside_the_grammar_is_named(scenes):
    with pytest.raises(DataError, match="a photo of an astronaut"):
        ShapesReward()([scenes[0][0]], ["a photo of an astronaut"])
