"""CLIP: agreement of picture and prompt, with any CLIP model of open_clip or transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.rewards import Images
from diffalign_rewards.backbone import DEFAULT_PRETRAINED, BackboneReward, BackboneSpec


class CLIPReward(BackboneReward):
    """Cosine between picture and prompt in CLIP's embedding, -1 to 1 (a good match: about 0.2 to 0.35).

    Others publish 100 cos or 2.5 max(cos, 0); that is a weight of the mixture here.

    Args:
        architecture: a name of `open_clip.list_models()`; default ViT-L-14-quickgelu. OpenAI's weights need
            the quickgelu variants.
        pretrained: a tag of `open_clip.list_pretrained()`; default openai.
        checkpoint: instead, a local folder of open_clip (open_clip_config.json, open_clip_model.safetensors,
            tokenizer files) or of transformers (CLIP, SigLIP, SigLIP 2: config.json, model.safetensors,
            preprocessor_config.json, tokenizer files), such a folder on the hub (`owner/name` or
            `owner/name@revision`), bundled:clip, or a .safetensors file of `architecture`.
        dtype, batch_size: as in `NetworkReward`.
    """

    name = "clip"
    range = (-1.0, 1.0)
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
        return self.backbone.cosine(images, prompts)
