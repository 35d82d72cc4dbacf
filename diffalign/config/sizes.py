"""Sizes of pictures, (height, width) in pixels, and how they are written in run files and on the command line."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeGuard

from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError

Size = tuple[int, int]
"""Height and width in pixels."""
Resolution = int | Size
"""The side of a square picture, or the height and width of any."""


def as_size(resolution: Resolution) -> Size:
    """Height and width."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


def as_resolution(size: Size) -> int | list[int]:
    """What files and keys hold: a square as its side, any other picture as [height, width]."""
    return size[0] if size[0] == size[1] else list(size)


def in_words(size: Size) -> str:
    """`512 x 768`, height first."""
    return f"{size[0]} x {size[1]}"


def parse_resolution(text: str) -> Resolution:
    """`512`, or height and width as `512x768`. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text.strip())
    if found is None:
        raise ValueError(f"not a size: {text!r}")
    height, width = int(found[1]), int(found[2] or found[1])
    if min(height, width) < 1:
        raise ValueError(f"not a size: {text!r}")
    return height if height == width else (height, width)


def _is_side(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_size(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_side, value))


def _checked_resolution(value: Any) -> Any:
    if _is_side(value) or _is_size(value):
        return value
    raise PydanticCustomError(
        "resolution", "it is a side in pixels, or [height, width], in whole numbers of at least 1"
    )


def _checked_buckets(value: Any) -> Any:
    if value == "auto":
        return value
    if not isinstance(value, list | tuple) or not value or not all(map(_is_size, value)):
        raise PydanticCustomError(
            "buckets", "it is auto, or a list of sizes such as [[512, 768], [768, 512]]"
        )
    if len({tuple(size) for size in value}) < len(value):
        raise PydanticCustomError("buckets", "a size is listed twice")
    return value


# Each is checked as a whole: pydantic's own errors of a union name its alternatives, not the option.
ResolutionOption = Annotated[int | tuple[int, int], BeforeValidator(_checked_resolution)]
BucketsOption = Annotated[Literal["auto"] | list[tuple[int, int]], BeforeValidator(_checked_buckets)]
