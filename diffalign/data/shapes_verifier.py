"""The exact checker of the Shapes world: does this picture show what the caption says?

It reads the finished picture only: foreground pixels are connected into objects, each object gets the nearest
palette colour and the shape of the best template, and the list is compared with the scene. A thing that is no
clear shape or no palette colour is "unknown": it counts as an object and matches nothing.

Tolerances are wide enough for a small VAE's blur and noise, and narrow enough that smears do not pass. Tilts
beyond 20 degrees (a square standing on its corner) are not what `render` draws and are not recognised.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
from PIL import Image, ImageDraw

from diffalign.data.shapes import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    draw_shape,
    parse_caption,
)

UNKNOWN = "unknown"

_MIN_AREA = 25  # px; smaller blobs are specks of the decoder, not objects
_OPACITY = 0.4  # a pixel is foreground from here on; 0 is the background, 1 a pure palette colour
_COLOUR_TOLERANCE = 50.0  # RGB distance of an object's median colour; palette colours are 100 apart
_DIMMEST = 0.75  # opacity down to which a whole object may fade and keep the name of its colour
# With the best template. Measured: renders under a blur of 1.0 px and noise of 10 stay above, other figures
# (a diamond reaches 0.86 as a circle, a trapezoid 0.82 as a triangle) stay below.
_MIN_IOU = {
    "circle": 0.90,
    "square": 0.86,
    "triangle": 0.84,
    "star": 0.81,
    "cross": 0.85,
    "ring": 0.80,
}
_CLEARLY_APART = 8.0  # px along a relation's axis, which must also exceed the offset across it
_GRID = 24  # side of a template, in cells

_PALETTE = np.array(list(COLOURS.values()), np.float32) - np.array(BACKGROUND, np.float32)
_PALETTE_SQUARED = (_PALETTE**2).sum(1)
_COLOUR_NAMES = tuple(COLOURS)

Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class Detection:
    """One object: `shape` and `colour` names or "unknown", `centre` (x, y) and `area` in px of 64x64."""

    shape: str
    colour: str
    centre: tuple[float, float]
    area: float


@dataclass(frozen=True)
class Verdict:
    """`correct` is strict; `score` in [0, 1] is partial credit and 1 exactly when correct."""

    correct: bool
    score: float
    detections: tuple[Detection, ...]


def verify(image: Picture, scene: Scene | str) -> Verdict:
    """Judge a picture against a scene or its caption.

    The score is the mean of: the number of objects (1 - |difference| / expected, never below 0); the shares
    of the expected objects whose colour, whose shape, and whose colour and shape together are there (one to
    one); and, for a relation, whether the best matching pair stands in it.

    Args:
        image: PIL image or uint8 [H, W, 3]; sizes other than 64x64 are resized with a box filter.
    Raises:
        ValueError: a caption outside the grammar, or an array of another type or shape.
    """
    wanted = parse_caption(scene) if isinstance(scene, str) else scene
    found = detect(image)
    score = _score(wanted, found)
    return Verdict(score == 1.0, score, tuple(found))


def verify_batch(images: np.ndarray | Sequence[Picture], captions: Sequence[str]) -> list[Verdict]:
    """`verify` for uint8 [N, H, W, 3] (or a list of pictures) and N captions.

    Raises:
        ValueError: lengths differ, or a caption is outside the grammar (its index is named).
    """
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} images but {len(captions)} captions")
    wanted = []
    for index, caption in enumerate(captions):
        try:
            wanted.append(parse_caption(caption))
        except ValueError as error:
            raise ValueError(f"captions[{index}]: {error}") from None
    return [verify(image, scene) for image, scene in zip(images, wanted, strict=True)]


def detect(image: Picture) -> list[Detection]:
    """The objects in a picture; arguments and errors as in `verify`."""
    pixels = _pixels(image)
    label, opacity = _nearest_colour(pixels)
    objects = [_measure(pixels, opacity, mask) for mask in _segment(label)]
    if not objects:
        return []
    shapes = _classify(np.stack([o.soft for o in objects]), objects)
    return [Detection(s, o.colour, o.centre, o.area) for s, o in zip(shapes, objects, strict=True)]


# --- comparing ----------------------------------------------------------------------------------------------


def _score(scene: Scene, found: Sequence[Detection]) -> float:
    expected = scene.count
    things = [thing for thing in scene.things for _ in range(thing.count)]

    def share(wanted: Iterable[object], present: Iterable[object]) -> float:
        return (Counter(wanted) & Counter(present)).total() / expected

    parts = [
        max(0.0, 1 - abs(len(found) - expected) / expected),
        share((t.colour for t in things), (d.colour for d in found)),
        share((t.shape for t in things), (d.shape for d in found)),
        share(((t.colour, t.shape) for t in things), ((d.colour, d.shape) for d in found)),
    ]
    if scene.relation is not None:
        parts.append(_relation_credit(scene, found))
    return math.fsum(parts) / len(parts)


def _relation_credit(scene: Scene, found: Sequence[Detection]) -> float:
    """1 or 0 for the pair that matches the two things best; the mean over equally good pairs.

    0 unless each of the pair has the colour or the shape of its thing.
    """
    first, second = scene.things
    pairs = {
        (a, b): (_agreement(first, a), _agreement(second, b))
        for a, b in permutations(found, 2)
        if _agreement(first, a) and _agreement(second, b)
    }
    if not pairs:
        return 0.0
    best = max(sum(agreement) for agreement in pairs.values())
    holds = [_holds(scene, *pair) for pair, agreement in pairs.items() if sum(agreement) == best]
    return sum(holds) / len(holds)


def _agreement(thing: Thing, detection: Detection) -> int:
    return (thing.colour == detection.colour) + (thing.shape == detection.shape)


def _holds(scene: Scene, first: Detection, second: Detection) -> bool:
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[
        scene.relation or ""
    ]
    return along >= _CLEARLY_APART and along > abs(across)


# --- finding objects ----------------------------------------------------------------------------------------


def _pixels(image: Picture) -> np.ndarray:
    """float32 [64, 64, 3], the background subtracted."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise ValueError(f"expected a uint8 array [H, W, 3], got {image.dtype} {list(image.shape)}")
        if image.shape[:2] == (SIZE, SIZE):
            return image.astype(np.float32) - np.array(BACKGROUND, np.float32)
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if image.size != (SIZE, SIZE):
        image = image.resize((SIZE, SIZE), Image.Resampling.BOX)
    return np.asarray(image, np.float32) - np.array(BACKGROUND, np.float32)


def _nearest_colour(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per pixel, the palette colour whose mixture with the background explains it best, and how much of it.

    Mixtures, not distances: the antialiased edge of a white disc is white at half opacity.
    """
    flat = pixels.reshape(-1, 3)
    squared = (flat**2).sum(1)
    lit = np.flatnonzero(squared > 40.0**2)  # opacity 0.4 of the darkest colour is already at 60
    projection = flat[lit] @ _PALETTE.T
    mixture = np.clip(projection / _PALETTE_SQUARED, 0, 1)
    residual = squared[lit, None] - 2 * mixture * projection + mixture**2 * _PALETTE_SQUARED
    best = residual.argmin(1)
    label = np.full(SIZE * SIZE, -1)
    opacity = np.zeros(SIZE * SIZE, np.float32)
    label[lit] = best
    opacity[lit] = mixture[np.arange(lit.size), best]
    label[opacity < _OPACITY] = -1
    return label.reshape(SIZE, SIZE), opacity.reshape(SIZE, SIZE)


def _segment(label: np.ndarray) -> list[np.ndarray]:
    """Boolean [64, 64] masks of the objects."""
    return [part for blob in _components(label >= 0) for part in _split_by_colour(blob, label)]


def _components(mask: np.ndarray) -> list[np.ndarray]:
    """Masks of the 4-connected components of at least the minimum area: runs joined by union-find."""
    padded = np.zeros((SIZE, SIZE + 2), np.int8)
    padded[:, 1:-1] = mask
    edges = np.flatnonzero(np.diff(padded.ravel()))
    starts, stops = edges[::2].tolist(), edges[1::2].tolist()
    parent = list(range(len(starts)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    above = 0
    for i, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        start, stop = start - (SIZE + 2), stop - (SIZE + 2)
        while stops[above] <= start:
            above += 1
        j = above
        while starts[j] < stop and j < i:
            mine, other = root(i), root(j)
            parent[max(mine, other)] = min(mine, other)
            j += 1
    component = np.full((SIZE, SIZE), -1)
    roots = np.array([root(i) for i in range(len(parent))], int)
    component[mask] = np.repeat(roots, edges[1::2] - edges[::2])
    area = np.bincount(component[mask])
    return [component == value for value in np.flatnonzero(area >= _MIN_AREA)]


def _split_by_colour(blob: np.ndarray, label: np.ndarray) -> list[np.ndarray]:
    """Touching objects of different colours, apart. A rim, or a thin blend of two colours, is no object."""
    area = np.bincount(label[blob], minlength=len(_COLOUR_NAMES))
    common = [layer for c in np.flatnonzero(area >= _MIN_AREA) if _has_core(layer := blob & (label == c))]
    if len(common) < 2:
        return [blob]
    parts = [part for layer in common for part in _components(layer) if _has_core(part)]
    if len(parts) < 2:
        return [blob]
    rest = np.argwhere(blob & ~np.logical_or.reduce(parts))
    if rest.size:
        gaps = [np.abs(rest[:, None] - np.argwhere(part)[None]).sum(-1).min(1) for part in parts]
        owner = np.argmin(gaps, axis=0)
        for (y, x), index in zip(rest, owner, strict=True):
            parts[index][y, x] = True
    return parts


def _has_core(part: np.ndarray) -> bool:
    """At least 4 pixels have all of their 3x3 neighbourhood inside."""
    rows = part[:-2] & part[1:-1] & part[2:]
    return int((rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]).sum()) >= 4


@dataclass(frozen=True)
class _Object:
    colour: str
    centre: tuple[float, float]
    area: float
    soft: np.ndarray  # [64, 64] crisp opacity in units of the object's own colour


def _measure(pixels: np.ndarray, opacity: np.ndarray, mask: np.ndarray) -> _Object:
    inside, strength = pixels[mask], opacity[mask]
    colour = np.median(inside[strength >= 0.9 * np.quantile(strength, 0.8)], axis=0)
    soft = np.zeros((SIZE, SIZE), np.float32)
    soft[mask] = weight = _crisp(inside @ colour / (colour @ colour))
    area = float(weight.sum())
    y, x = (float(weight @ index) / area + 0.5 for index in np.nonzero(mask))
    return _Object(_colour_name(colour), (x, y), area, soft)


def _crisp(opacity: np.ndarray) -> np.ndarray:
    """Twice the contrast about one half: undoes a slight blur and the grain inside an object."""
    return np.clip(2 * opacity - 0.5, 0, 1)


def _colour_name(colour: np.ndarray) -> str:
    mixture = np.clip(_PALETTE @ colour / _PALETTE_SQUARED, _DIMMEST, 1)
    distance = np.linalg.norm(mixture[:, None] * _PALETTE - colour, axis=1)
    nearest = int(distance.argmin())
    return _COLOUR_NAMES[nearest] if distance[nearest] <= _COLOUR_TOLERANCE else UNKNOWN


# --- naming shapes ------------------------------------------------------------------------------------------


def _classify(soft: np.ndarray, objects: Sequence[_Object]) -> list[str]:
    templates, names = _templates()
    iou = _iou(_normalised(soft, objects), templates)
    best = iou.argmax(1)
    return [names[k] if iou[i, k] >= _MIN_IOU[names[k]] else UNKNOWN for i, k in enumerate(best)]


def _iou(cells: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Soft intersection over union, [N, G] against [T, G] -> [N, T]."""
    common = np.minimum(cells[:, None], templates[None]).sum(-1)
    return common / (cells.sum(1)[:, None] + templates.sum(1)[None] - common)


def _normalised(soft: np.ndarray, objects: Sequence[_Object]) -> np.ndarray:
    """Each object resampled (bilinear) to a grid of its own centre and size: [N, GRID * GRID]."""
    half = 0.95 * np.sqrt([o.area for o in objects])[:, None]
    ticks = np.linspace(-1, 1, _GRID)[None] * half
    x = ticks + np.array([o.centre[0] for o in objects])[:, None] - 0.5
    y = ticks + np.array([o.centre[1] for o in objects])[:, None] - 0.5
    # Bilinear sampling is separable: rows = Wy @ soft, then @ Wx^T, with hat-function weights.
    pixel = np.arange(SIZE)
    weight_x = np.clip(1 - np.abs(x[:, :, None] - pixel), 0, None).astype(np.float32)
    weight_y = np.clip(1 - np.abs(y[:, :, None] - pixel), 0, None).astype(np.float32)
    return (weight_y @ soft @ weight_x.transpose(0, 2, 1)).reshape(len(objects), -1)


@lru_cache(maxsize=1)
def _templates() -> tuple[np.ndarray, tuple[str, ...]]:
    """Template rows [T, GRID * GRID] and the shape each stands for, measured like any other picture."""
    scale = 8
    cells, names = [], []
    for shape in SHAPES:
        for tilt in (0,) if shape in ("circle", "ring") else range(-20, 21, 4):
            picture = Image.new("L", (SIZE * scale,) * 2)
            centre = (SIZE * scale / 2, SIZE * scale / 2)
            draw_shape(ImageDraw.Draw(picture), shape, centre, 11.0 * scale, math.radians(tilt), 255, hole=0)
            soft = _crisp(np.asarray(picture.reduce(scale), np.float32) / 255)
            weights = soft.sum()
            y, x = ((soft.sum(axis) @ np.arange(SIZE) / weights + 0.5) for axis in (1, 0))
            whole = _Object("", (float(x), float(y)), float(weights), soft)
            cells.append(_normalised(soft[None], [whole])[0])
            names.append(shape)
    return np.stack(cells), tuple(names)
