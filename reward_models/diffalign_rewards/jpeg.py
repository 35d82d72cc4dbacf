"""Size as a JPEG file, the toy rewards of DDPO (Black et al. 2023, arXiv:2305.13301, sec. 5.1)."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.images import to_pil
from diffalign.rewards import RewardModel

QUALITY = 95


def jpeg_kilobytes(picture: Image.Image) -> float:
    """Bytes / 1000 of the picture as a JPEG of quality 95."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000


class JPEGIncompressibility(RewardModel):
    """Kilobytes as a JPEG of quality 95: rewards detail (and noise)."""

    name = "jpeg_incompressibility"
    range = (0.0, math.inf)
    needs_prompt = False
    license = "Apache-2.0"
    sign = 1.0

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.score_pictures(to_pil(images), prompts)

    def score_pictures(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self.sign * jpeg_kilobytes(picture) for picture in pictures])


class JPEGCompressibility(JPEGIncompressibility):
    """Minus the kilobytes as a JPEG of quality 95: rewards smooth pictures."""

    name = "jpeg_compressibility"
    range = (-math.inf, 0.0)
    sign = -1.0
