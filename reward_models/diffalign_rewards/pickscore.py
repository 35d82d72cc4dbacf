"""PickScore (Kirstain et al. 2023, arXiv:2305.01569): CLIP-H, fine-tuned on choices of users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.rewards import Images
from diffalign_rewards.backbone import BackboneReward, BackboneSpec
from diffalign_rewards.transformers_towers import has_processor
from diffalign_rewards.weights import fetch_hub_folder, hub_id, local_path

CHECKPOINT = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"


class PickScoreReward(BackboneReward):
    """PickScore: which picture of a prompt people would choose, mostly 17 to 24.

        exp(logit_scale) * cos(picture, prompt)

    Args:
        checkpoint: a local copy of yuvalkirstain/PickScore_v1, or of another fine-tuned CLIP of transformers.
        processor: a folder with tokenizer and preprocessing; default: the checkpoint's own if it is local and
            has them, else those of laion/CLIP-ViT-H-14-laion2B-s32B-b79K, as published.
        dtype, batch_size: as in `NetworkReward`.
    """

    name = "pickscore"
    license = "MIT"

    def __init__(
        self,
        *,
        checkpoint: str | None = None,
        processor: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(dtype=dtype, batch_size=batch_size)
        spec = BackboneSpec.of(None, None, checkpoint or CHECKPOINT)
        if not spec.of_transformers:
            raise RewardError(
                "PickScore is a model of transformers", where=str(spec), why="this folder is open_clip's"
            )
        own = checkpoint is not None and spec.checkpoint is not None and has_processor(spec.checkpoint)
        source = None if own and processor is None else _find_processor(processor or PROCESSOR)
        self.spec = replace(spec, processor=source, dtype=self.dtype)
        self.to(device)
        self.range = (-self.backbone.logit_scale, self.backbone.logit_scale)

    def judge(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.backbone.logit_scale * self.backbone.cosine(images, prompts)


def _find_processor(name: str) -> Path:
    hub = hub_id(name)
    if hub is None:
        return local_path(name, "the processor of PickScore")
    return fetch_hub_folder(*hub, ["*.json", "*.txt"], "preprocessor_config.json", "processor")
