"""HPS v2 (Wu et al. 2023, arXiv:2306.09341): CLIP-H, fine-tuned on human preferences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.rewards import Images
from diffalign_rewards.backbone import BackboneReward, BackboneSpec
from diffalign_rewards.weights import HubFile, fetch_pinned, local_path, verify

ARCHITECTURE = "ViT-H-14"
_REPOSITORY, _REVISION = "xswu/HPSv2", "697403c78157020a1ae59d23f111aa58ced35b0a"
WEIGHTS = {
    "2.0": HubFile(
        _REPOSITORY,
        "HPS_v2_compressed.pt",
        _REVISION,
        "07cb0d20626232204ca3a6ec53ff5984e7e53212a8a7b0e0ec2bac1bdaf125a1",
    ),
    "2.1": HubFile(
        _REPOSITORY,
        "HPS_v2.1_compressed.pt",
        _REVISION,
        "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
    ),
}


class HPSv2Reward(BackboneReward):
    """Human Preference Score v2: cosine of picture and prompt, mostly 0.20 to 0.33.

    The whole picture is seen: its longest side is scaled to 224 pixels, and black is added.

    Args:
        version: "2.1" (the default) or "2.0".
        checkpoint: a local copy of that version's published file, a .safetensors file of its tensors, or a folder
            in open_clip's hub layout.
        dtype, batch_size: as in `NetworkReward`.
    """

    name = "hpsv2"
    range = (-1.0, 1.0)
    license = "Apache-2.0"

    def __init__(
        self,
        *,
        version: str | float = "2.1",
        checkpoint: str | None = None,
        dtype: str = "float32",
        batch_size: int = 32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(dtype=dtype, batch_size=batch_size)
        if str(version) not in WEIGHTS:
            raise RewardError(f"there is no HPS v{version}", hint=f"choose from {', '.join(WEIGHTS)}")
        self.spec = replace(_find(WEIGHTS[str(version)], checkpoint), pad=True, dtype=self.dtype)
        self.to(device)

    def judge(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.backbone.cosine(images, prompts)


def _find(published: HubFile, checkpoint: str | None) -> BackboneSpec:
    if checkpoint is None:
        return BackboneSpec(ARCHITECTURE, None, fetch_pinned(published))
    path: Path = local_path(checkpoint, "the HPS checkpoint")
    if path.suffix == ".pt":
        verify(
            path, published.sha256, hint=f"{published.name} of {published.repository}, or a .safetensors file"
        )
        return BackboneSpec(ARCHITECTURE, None, path)
    spec = BackboneSpec.of(None if path.is_dir() else ARCHITECTURE, None, str(path))
    if spec.of_transformers and path.is_dir():
        raise RewardError(
            "HPS v2 is a model of open_clip", where=str(path), why="this folder is of transformers"
        )
    return spec
