"""CLIP-IQA (Wang et al. 2022, arXiv:2207.12396): does the picture look more like a good photo or a bad one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.rewards import Images
from diffalign_rewards.backbone import DEFAULT_PRETRAINED, BackboneReward, BackboneSpec

GOOD, BAD = "Good photo.", "Bad photo."


class CLIPIQAReward(BackboneReward):
    """Quality of the picture by CLIP-IQA, 0 to 1: "Good photo." against "Bad photo.".

        softmax(logit_scale * (cos(picture, good), cos(picture, bad)))[0]

    Args:
        architecture, pretrained, checkpoint: the CLIP model, as in the reward `clip`.
        dtype, batch_size: as in `NetworkReward`.
    """

    name = "clip_iqa"
    range = (0.0, 1.0)
    needs_prompt = False
    license = "MIT"

    def __init__(
        self,
        *,
        architecture: str | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(dtype=dtype, batch_size=batch_size)
        self.spec = replace(BackboneSpec.of(architecture, pretrained, checkpoint), dtype=self.dtype)
        if self.spec.pretrained != DEFAULT_PRETRAINED:
            self.license = "of the given model"
        self.to(device)

    def judge(self, images: Images, prompts: Sequence[str]) -> Tensor:
        good, bad = self.backbone.embed_texts([GOOD, BAD])
        return torch.sigmoid(self.backbone.logit_scale * (self.backbone.embed_images(images) @ (good - bad)))
