"""CLIP-IQA (Wang et al. 2022, arXiv:2207.12396): does the picture look more like a good photo or a bad one?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.rewards import Images
from diffalign_rewards.clip import CLIPReward

GOOD, BAD = "Good photo.", "Bad photo."


class CLIPIQAReward(CLIPReward):
    """Quality of the picture by CLIP-IQA, 0 to 1: "Good photo." against "Bad photo.".

        softmax(logit_scale * (cos(picture, good), cos(picture, bad)))[0]

    Args:
        as in the reward `clip`.
    """

    name = "clip_iqa"
    range = (0.0, 1.0)
    needs_prompt = False

    def judge(self, images: Images, prompts: Sequence[str]) -> Tensor:
        good, bad = self.backbone.embed_texts([GOOD, BAD])
        return torch.sigmoid(self.backbone.logit_scale * (self.backbone.embed_images(images) @ (good - bad)))
