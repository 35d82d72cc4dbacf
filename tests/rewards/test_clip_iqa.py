"""CLIP-IQA on a tiny CLIP."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffalign_rewards.clip_iqa import CLIPIQAReward
from PIL import Image
from torch.testing import assert_close

from diffalign.errors import RewardError


def test_score_is_the_softmax_of_good_against_bad(clip_folder: Path, photographs: list[Image.Image]):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    model.eval()
    with torch.no_grad():
        image = F.normalize(
            model.encode_image(torch.stack([preprocess(picture) for picture in photographs])), dim=-1
        )
        text = F.normalize(model.encode_text(tokenizer(["Good photo.", "Bad photo."])), dim=-1)
        expected = (model.logit_scale.exp() * image @ text.T).softmax(-1)[:, 0]
    assert expected.std() > 0.001
    reward = CLIPIQAReward(checkpoint=str(clip_folder))
    scores = reward(photographs, ["ignored"] * len(photographs))
    assert_close(scores, expected, rtol=0, atol=1e-5)
    assert_close(reward(photographs, [""] * len(photographs)), scores)
    assert ((scores > 0) & (scores < 1)).all()
    assert not reward.needs_prompt


def test_bad_weights_are_named(tmp_path: Path):
    with pytest.raises(RewardError, match="the CLIP checkpoint does not exist"):
        CLIPIQAReward(checkpoint=str(tmp_path / "nothing"))
