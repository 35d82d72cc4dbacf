"""Pictures as CLIP models expect them, from PIL and from float tensors, in one place.

The PIL path is the published one (8-bit resize) and equals the transforms of open_clip and transformers. The
tensor path is differentiable and within 0.5/255 of it on average: antialiasing is what matters, without it the
two are several levels apart, and scores do not reproduce.
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
_PIL_FILTERS: dict[int, Literal["bicubic", "bilinear"]] = {3: "bicubic", 2: "bilinear"}
_SHORTEST = {"do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True}
_SQUASH = _SHORTEST | {"do_center_crop": False}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop or pad at the centre, normalise.

    `size` is (height, width) in pixels. `shortest` scales the shortest side to a square size and crops,
    `longest` scales the longest side to it and pads with black, `squash` ignores the aspect ratio.
    `crop` is what is done with half a pixel: open_clip rounds (to even), transformers rounds down.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    crop: Literal["round", "floor"] = "round"

    @classmethod
    def from_open_clip(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """From an open_clip model's `visual.preprocess_cfg`."""
        size = cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        mode, interpolation = cfg["resize_mode"], cfg["interpolation"]
        known = mode == "squash" or (mode in ("shortest", "longest") and height == width)
        if (
            interpolation not in _FILTERS
            or not known
            or (mode == "longest" and cfg.get("fill_color", 0) != 0)
        ):
            raise _unsupported(f"resize_mode {mode}, interpolation {interpolation}, size {height}x{width}")
        return cls((height, width), tuple(cfg["mean"]), tuple(cfg["std"]), interpolation, mode)

    @classmethod
    def from_transformers(cls, cfg: Mapping[str, Any]) -> Preprocessing:
        """From the preprocessor_config.json of a CLIP or SigLIP model."""
        size, interpolation = cfg.get("size"), _PIL_FILTERS.get(cfg.get("resample", 3))
        sides = size if isinstance(size, Mapping) else {"shortest_edge": size}
        crop = cfg.get("crop_size", sides.get("shortest_edge"))
        crops = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
        short = sides.get("shortest_edge")
        if interpolation and _does(cfg, _SHORTEST) and short and crops == {"height": short, "width": short}:
            mode, target = "shortest", (short, short)
        elif interpolation and _does(cfg, _SQUASH) and {"height", "width"} <= sides.keys():
            mode, target = "squash", (sides["height"], sides["width"])
        else:
            raise _unsupported(f"size {size}, crop_size {crop}, resample {cfg.get('resample')}")
        mean, std = tuple(cfg["image_mean"]), tuple(cfg["image_std"])
        return cls(target, mean, std, interpolation, mode, "floor")  # type: ignore[arg-type]

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
        if self.resize_mode == "longest":
            bottom, right = self.size[0] - height + top, self.size[1] - width + left
            return self._normalise(F.pad(images, (-left, right, -top, bottom)))
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
        side = self.size[0]
        if self.resize_mode == "longest":
            scale = side / max(height, width)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if width <= height:
            return int(side * height / width), side
        return side, int(side * width / height)

    def _corner(self, height: int, width: int) -> tuple[int, int]:
        """Top and left of the kept rectangle; negative where black is added."""
        spare = height - self.size[0], width - self.size[1]
        if self.resize_mode == "longest":
            return -(-spare[0] // 2), -(-spare[1] // 2)
        if self.crop == "floor":
            return spare[0] // 2, spare[1] // 2
        return round(spare[0] / 2), round(spare[1] / 2)

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (images - mean) / std


def _does(cfg: Mapping[str, Any], steps: Mapping[str, bool]) -> bool:
    """Whether the processor takes exactly these steps; one that is not named is taken as expected."""
    return all(cfg.get(step, done) == done for step, done in steps.items())


def _unsupported(found: str) -> RewardError:
    return RewardError(
        "this model's preprocessing is not supported",
        why=found,
        hint="supported: shortest side to a square and a crop of it, longest side and black padding, or squash; "
        "bicubic or bilinear",
    )
