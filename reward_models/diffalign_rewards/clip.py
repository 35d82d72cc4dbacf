"""CLIP: agreement of picture and prompt, with any open_clip model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from PIL import Image
from torch import Tensor

from diffalign.rewards import Images, RewardModel
from diffalign_rewards.backbone import BackboneSpec, shared_backbone


class CLIPReward(RewardModel):
    """Cosine between picture and prompt in CLIP's embedding, -1 to 1 (a good match: about 0.2 to 0.35).

    Others publish 100 cos or 2.5 max(cos, 0); that is a weight of the mixture here.

    Args:
        architecture: a name of `open_clip.list_models()`; default ViT-L-14-quickgelu. OpenAI's weights need
            the quickgelu variants.
        pretrained: a tag of `open_clip.list_pretrained()`; default openai.
        checkpoint: instead, a local folder in open_clip's hub layout (open_clip_config.json,
            open_clip_model.safetensors, tokenizer files), bundled:clip, or a .safetensors file of
            `architecture`.
    """

    name = "clip"
    range = (-1.0, 1.0)
    differentiable = True
    license = "MIT"

    def __init__(
        self,
        *,
        architecture: str | None = None,
        pretrained: str | None = None,
        checkpoint: str | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self.spec = BackboneSpec.of(architecture, pretrained, checkpoint)
        self.to(device)

    @property
    def parameters(self) -> int:
        return self.backbone.parameters

    def to(self, device: str | torch.device) -> Self:
        self.backbone = shared_backbone(self.spec, device)
        return super().to(device)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self._cosine(images, prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return self._cosine(pictures, prompts)

    def _cosine(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return (self.backbone.embed_images(images) * self.backbone.embed_texts(prompts)).sum(-1)
