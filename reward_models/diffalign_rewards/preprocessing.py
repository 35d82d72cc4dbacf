"""Pictures as CLIP models expect them, from PIL and from float tensors, in one place.

The PIL path is the published one (8-bit resize) and equals open_clip's own transform. The tensor path is
differentiable and within 0.5/255 of it on average: antialiasing is what matters, without it the two are
several levels apart, and scores do not reproduce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.errors import RewardError
from diffalign.images import to_tensor

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise.

    `size` is (height, width) in pixels. `shortest` scales the shortest side to a square size and crops,
    `squash` ignores the aspect ratio.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """From an open_clip model's `visual.preprocess_cfg`."""
        size = cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        mode, interpolation = cfg["resize_mode"], cfg["interpolation"]
        if interpolation not in _FILTERS or not (
            mode == "squash" or (mode == "shortest" and height == width)
        ):
            raise RewardError(
                "this model's preprocessing is not supported",
                why=f"resize_mode {mode}, interpolation {interpolation}, size {height}x{width}",
                hint="supported: shortest side to a square, or squash; bicubic or bilinear",
            )
        return cls((height, width), tuple(cfg["mean"]), tuple(cfg["std"]), interpolation, mode)

    def pictures(self, pictures: Sequence[Image.Image]) -> Tensor:
        """float32 [B, 3, *size] of RGB PIL pictures of any sizes."""
        return self._normalise(to_tensor([self._resize_picture(picture) for picture in pictures]))

    def tensor(self, images: Tensor) -> Tensor:
        """float32 [B, 3, *size] of [B, 3, H, W] in [0, 1]; gradients reach the pixels."""
        height, width = self._scaled(*images.shape[-2:])
        if (height, width) != tuple(images.shape[-2:]):
            images = F.interpolate(
                images, (height, width), mode=self.interpolation, align_corners=False, antialias=True
            ).clamp(0, 1)
        top, left = self._corner(height, width)
        return self._normalise(images[..., top : top + self.size[0], left : left + self.size[1]])

    def _resize_picture(self, picture: Image.Image) -> Image.Image:
        height, width = self._scaled(picture.height, picture.width)
        if (height, width) != (picture.height, picture.width):
            picture = picture.resize((width, height), _FILTERS[self.interpolation])
        top, left = self._corner(height, width)
        return picture.crop((left, top, left + self.size[1], top + self.size[0]))

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        if self.resize_mode == "squash":
            return self.size
        short = self.size[0]
        if width <= height:
            return int(short * height / width), short
        return short, int(short * width / height)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        return round((height - self.size[0]) / 2), round((width - self.size[1]) / 2)

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std
