"""Aspect buckets: sizes that pictures are trained at, and which of them each item of a data set goes to.

An item is a picture, or several that must have one size: a preference pair is one item, and never split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from diffalign.config.sizes import Resolution, Size, as_size, in_words
from diffalign.data.substitutes import read_patiently
from diffalign.errors import DataError

STEP = 64
"""Pixels between the sides of generated sizes: a multiple of what any supported model's latents and patches need."""
NAMED = 12
"""Buckets that a line of text names, the fullest first."""


def bucket_sizes(
    buckets: Literal["auto"] | Sequence[Size] | None, resolution: Resolution | None
) -> list[Size] | None:
    """What `data.buckets` asks for, beside `model.resolution`; None: no buckets."""
    if buckets != "auto":
        return None if buckets is None else list(buckets)
    if resolution is None:
        raise ValueError("auto needs a resolution")
    return sizes_like(resolution)


def sizes_like(resolution: Resolution) -> list[Size]:
    """Sizes of all shapes whose area is at most that of `resolution`, and close to it, which is the first of them.

    Sides are multiples of 64 pixels (below 512 pixels of the largest power of two in an eighth of the side) between
    half and double the side of the square of that area.
    """
    whole = as_size(resolution)
    area = math.prod(whole)
    side = math.isqrt(area)
    step = min(STEP, 1 << (max(1, side // 8).bit_length() - 1))
    found = {whole: None}
    for long in range(step * -(-side // 2 // step), 2 * side + 1, step):
        short = area // long // step * step
        if long and 2 * short >= side and short <= 2 * side:
            found |= {(long, short): None, (short, long): None}
    return list(found)


def nearest(picture: Size, sizes: Sequence[Size]) -> int:
    """Number of the size whose height to width is nearest to the picture's, by its logarithm.

    Among sizes of one shape it is the largest that the picture fills without being enlarged; else the smallest.
    """
    shape = math.log(picture[0] / picture[1])
    distances = [abs(math.log(height / width) - shape) for height, width in sizes]
    near = [number for number, distance in enumerate(distances) if distance < min(distances) + 1e-9]
    filled = [n for n in near if sizes[n][0] <= picture[0] and sizes[n][1] <= picture[1]]
    if filled:
        return max(filled, key=lambda number: math.prod(sizes[number]))
    return min(near, key=lambda number: math.prod(sizes[number]))


def told(picture: Size, size: Size) -> tuple[int, int, int, int, int, int]:
    """What a network that is conditioned on sizes is told of a picture that was resized to cover `size` and cropped.

    In pixels: the picture's height and width, top and left of the crop in the resized picture, height and width of the
    crop (Podell et al. 2023, arXiv:2307.01952, section 2.2).
    """
    scale = max(size[0] / picture[0], size[1] / picture[1])
    top, left = ((round(before * scale) - after) // 2 for before, after in zip(picture, size, strict=True))
    return *picture, top, left, *size


class Buckets:
    """Which size each item of a data set has in training: the one nearest to the shape of its first picture.

    An item whose header cannot be read goes to the fullest bucket; another item of that bucket stands in for it.

    Args:
        sizes: all that there may be.
        count: items in all.
        read: the sizes of an item's pictures; raises DataError where one cannot be read.

    Raises:
        DataError: no item can be read.
    """

    def __init__(self, sizes: Sequence[Size], count: int, read: Callable[[int], Sequence[Size]]) -> None:
        self._read = read
        self._pictures: list[Sequence[Size] | None] = []
        error: DataError | None = None
        for index in range(count):
            try:
                self._pictures.append(tuple(read_patiently(read, index)))
            except DataError as found:
                self._pictures.append(None)
                error = found
        numbers = [None if found is None else nearest(found[0], sizes) for found in self._pictures]
        present = [number for number in numbers if number is not None]
        if count and not present:
            assert error is not None
            raise error
        fullest = max(set(present), key=present.count) if present else 0
        self._number = [fullest if number is None else number for number in numbers]
        self._members: dict[int, list[int]] = {number: [] for number in range(len(sizes))}
        for index, number in enumerate(self._number):
            self._members[number].append(index)
        self._sizes = list(sizes)

    @property
    def groups(self) -> list[list[int]]:
        """The items of each bucket that has any."""
        return [members for members in self._members.values() if members]

    @property
    def sizes(self) -> list[Size]:
        """The size of each of `groups`."""
        return [self._sizes[number] for number, members in self._members.items() if members]

    def size(self, index: int) -> Size:
        """What the pictures of an item are cropped to."""
        return self._sizes[self._number[index]]

    def mates(self, index: int) -> Sequence[int]:
        """The items of the same bucket, itself among them."""
        return self._members[self._number[index]]

    def told(self, index: int) -> Tensor:
        """`told` of each picture of an item: float32 [k, 6]."""
        pictures = self._pictures[index]
        if pictures is None:
            pictures = self._read(index)
        return torch.tensor([told(picture, self.size(index)) for picture in pictures], dtype=torch.float32)

    def describe(self) -> str:
        """How many items each bucket has, the fullest first: `2 sizes (height x width): 300 at 512 x 512, ...`."""
        held = sorted(zip(self.groups, self.sizes, strict=True), key=lambda pair: -len(pair[0]))
        parts = [f"{len(members):,} at {in_words(size)}" for members, size in held]
        if len(parts) > NAMED:
            rest = sum(len(members) for members, _ in held[NAMED:])
            parts = [*parts[:NAMED], f"{rest:,} at {len(held) - NAMED} others"]
        return f"{len(held)} sizes (height x width): {', '.join(parts)}"

    def warning(self, batch: int) -> str | None:
        """What to tell the user of buckets with fewer items than a batch; None: there are none."""
        small = [
            in_words(size)
            for members, size in zip(self.groups, self.sizes, strict=True)
            if len(members) < batch
        ]
        if not small:
            return None
        named = ", ".join(small[:NAMED]) + (", ..." if len(small) > NAMED else "")
        return (
            f"warning: {len(small)} of {len(self.groups)} buckets hold less than a batch ({batch}): {named}; a batch "
            "of theirs has the same picture several times. Fewer data.buckets, or a smaller batch, would avoid it"
        )
