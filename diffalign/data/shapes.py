"""Shapes: a captioned world small enough to check exactly.

A scene is either one kind of thing, counted ("two red stars"), or two things in a relation ("a red star above
a blue circle"). `render` draws it, `Scene.caption` describes it, `parse_caption` inverts every description,
and `diffalign.data.shapes_verifier` judges any picture against it.

Decisions:
- Scenes are divided by rule, never by file. A quarter of the (shape, colour) combinations is held out: a
  scene that shows one of them is "ood". Every shape and every colour still occurs in-domain, so only the
  *combination* is new. The other scenes are "train" or "eval" by a hash of what they mean.
- Everything random takes a `numpy.random.Generator` and is a pure function of it.
- numpy and pillow only: the renderer feeds data workers that need no torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
BACKGROUND = (28, 30, 38)
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 45),
    "orange": (245, 130, 20),
    "yellow": (250, 225, 50),
    "green": (40, 175, 70),
    "cyan": (50, 215, 230),
    "blue": (45, 85, 230),
    "purple": (165, 60, 205),
    "white": (245, 245, 245),
}
RELATIONS = ("left of", "right of", "above", "below")
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNTS = {"one": 1, "two": 2, "three": 3}

Split = Literal["train", "eval", "ood"]
Attribute = Literal["colour", "shape", "count", "relation"]

_COLOUR_NAMES = tuple(COLOURS)
_COUNT_WORDS = {count: word for word, count in COUNTS.items()}
_LEADS = ("", "there is ", "a picture of ", "an image with ")


@dataclass(frozen=True)
class Thing:
    """`count` (1 to 3) objects of one shape and one colour. ValueError outside the vocabulary."""

    shape: str
    colour: str
    count: int = 1

    def __post_init__(self) -> None:
        for what, value, allowed in (
            ("shape", self.shape, SHAPES),
            ("colour", self.colour, _COLOUR_NAMES),
            ("count", self.count, tuple(_COUNT_WORDS)),
        ):
            if value not in allowed:
                raise ValueError(f"{value!r} is not a {what} of Shapes; choose from {_listed(allowed)}")

    def phrase(self, *, article: bool = True) -> str:
        """'an orange star', 'three red crosses'; with article=False 'one orange star'."""
        if self.count > 1:
            return f"{_COUNT_WORDS[self.count]} {self.colour} {_plural(self.shape)}"
        count = ("an" if self.colour[0] in "aeiou" else "a") if article else "one"
        return f"{count} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One Thing and no relation, or two different single Things: `things[0]` is `relation` `things[1]`.

    Equality is literal; compare `canonical()` to compare meaning. ValueError for anything else.
    """

    things: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if self.relation is None:
            if len(self.things) != 1:
                raise ValueError(f"a scene without a relation has exactly one Thing, got {len(self.things)}")
            return
        if self.relation not in RELATIONS:
            raise ValueError(f"{self.relation!r} is not a relation; choose from {_listed(RELATIONS)}")
        if len(self.things) != 2 or any(thing.count != 1 for thing in self.things):
            raise ValueError(f"a relation ({self.relation!r}) joins exactly two Things of count 1")
        if self.things[0] == self.things[1]:
            raise ValueError(f"{self.relation!r} joins two equal things; they must differ in shape or colour")

    @property
    def phrasings(self) -> int:
        """How many phrasings `caption` knows: 4 for a counted scene, 8 for a relation."""
        return len(_LEADS) * (1 if self.relation is None else 2)

    @property
    def count(self) -> int:
        """Objects in the picture."""
        return sum(thing.count for thing in self.things)

    def canonical(self) -> Scene:
        """The same meaning, told with 'left of' or 'above' only: equivalent scenes become equal."""
        return self._inverse() if self.relation in ("right of", "below") else self

    def caption(self, phrasing: int = 0) -> str:
        """Describe the scene; `phrasing` in range(`phrasings`). Odd phrasings of a relation tell its inverse.

        ValueError when `phrasing` is out of range.
        """
        if not 0 <= phrasing < self.phrasings:
            raise ValueError(f"phrasing {phrasing} does not exist; this scene has 0 to {self.phrasings - 1}")
        if self.relation is None:
            thing, lead = self.things[0], _LEADS[phrasing]
            if thing.count > 1:
                lead = lead.replace("is", "are")
            return lead + thing.phrase(article=phrasing != 3)
        told = self._inverse() if phrasing % 2 else self
        first, second = told.things
        return f"{_LEADS[phrasing // 2]}{first.phrase()} {told.relation} {second.phrase()}"

    def _inverse(self) -> Scene:
        assert self.relation is not None
        return Scene(self.things[::-1], INVERSE[self.relation])


def parse_caption(text: str) -> Scene:
    """The scene a caption describes, in canonical form; inverts every phrasing of `Scene.caption`.

    Case, extra spaces, a final full stop and a/an are forgiven. ValueError, naming the reason, for text
    outside the grammar.
    """
    words = " ".join(text.lower().split()).removesuffix(".").rstrip()
    body = re.sub(r"^(there is|there are|a picture of|an image with) ", "", words)
    relation = re.search(rf" ({'|'.join(RELATIONS)}) ", body)
    try:
        if relation is None:
            return Scene((_parse_thing(body),))
        first, second = body[: relation.start()], body[relation.end() :]
        return Scene((_parse_thing(first), _parse_thing(second)), relation[1]).canonical()
    except ValueError as error:
        raise ValueError(
            f"caption {text!r} is outside the Shapes grammar: {error}. "
            "Write for example 'two red stars' or 'a red star above a blue circle'"
        ) from None


def is_held_out(scene: Scene) -> bool:
    """True when any Thing is one of the held-out quarter: (shape index + colour index) % 4 == 3.

    Each shape keeps 6 of its 8 colours in-domain and each colour 4 or 5 of its 6 shapes.
    """
    return any((SHAPES.index(t.shape) + _COLOUR_NAMES.index(t.colour)) % 4 == 3 for t in scene.things)


def split(scene: Scene) -> Split:
    """'ood' for held-out combinations; otherwise 'eval' (a fifth) or 'train' by a hash of the meaning.

    Equivalent scenes share a split; the hash (blake2b) does not depend on the Python run.
    """
    if is_held_out(scene):
        return "ood"
    digest = hashlib.blake2b(scene.canonical().caption().encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % 5 == 0 else "train"


@lru_cache(maxsize=3)
def scenes(split_name: Split) -> tuple[tuple[Scene, ...], tuple[Scene, ...]]:
    """Every canonical scene of a split: (counted, related). ValueError for an unknown split."""
    if split_name not in get_args(Split):
        raise ValueError(f"{split_name!r} is not a split of Shapes; choose from {_listed(get_args(Split))}")
    kinds = [Thing(shape, colour) for shape in SHAPES for colour in _COLOUR_NAMES]
    counted = (Scene((replace(thing, count=count),)) for thing in kinds for count in COUNTS.values())
    related = (Scene((a, b), rel) for rel in ("left of", "above") for a in kinds for b in kinds if a != b)

    def of_split(candidates: Iterable[Scene]) -> tuple[Scene, ...]:
        return tuple(scene for scene in candidates if split(scene) == split_name)

    return of_split(counted), of_split(related)


def draw_scene(rng: np.random.Generator, split_name: Split) -> Scene:
    """A random canonical scene of the split: counted with probability 0.4, else a relation."""
    pool = scenes(split_name)[int(rng.random() >= 0.4)]
    return pool[rng.integers(len(pool))]


def draw_prompts(n: int, split_name: Split, seed: int) -> list[str]:
    """`n` captions of a split, randomly phrased, 40 % counted.

    No scene repeats before all scenes of the split are used; when one kind runs out the other fills in.
    """
    rng = np.random.default_rng(seed)
    pools: list[list[Scene]] = [[], []]
    prompts = []
    for _ in range(n):
        if not any(pools):
            pools = [[kind[i] for i in rng.permutation(len(kind))] for kind in scenes(split_name)]
        wanted = int(rng.random() >= 0.4)
        scene = (pools[wanted] or pools[1 - wanted]).pop()
        prompts.append(scene.caption(int(rng.integers(scene.phrasings))))
    return prompts


def corrupt(scene: Scene, rng: np.random.Generator, attribute: Attribute | None = None) -> Scene:
    """The scene with exactly one attribute changed; never equivalent to it, of any split.

    Args:
        attribute: which one to change; None draws one of the three that the scene has.
    Raises:
        ValueError: the scene has no such attribute (a relation scene no count, a counted one no relation).
    """
    last: Attribute = "count" if scene.relation is None else "relation"
    available: tuple[Attribute, ...] = ("colour", "shape", last)
    if attribute is None:
        attribute = available[rng.integers(3)]
    if attribute not in available:
        raise ValueError(f"{scene.caption()!r} has no {attribute}; choose from {_listed(available)}")
    if attribute == "relation":
        others = [relation for relation in RELATIONS if relation != scene.relation]
        return replace(scene, relation=others[rng.integers(3)])
    which = int(rng.integers(len(scene.things)))
    thing = scene.things[which]
    changed = {
        "colour": [replace(thing, colour=colour) for colour in _COLOUR_NAMES],
        "shape": [replace(thing, shape=shape) for shape in SHAPES],
        "count": [replace(thing, count=count) for count in COUNTS.values()],
    }[attribute]
    allowed = [other for other in changed if other not in scene.things]
    things = list(scene.things)
    things[which] = allowed[rng.integers(len(allowed))]
    return replace(scene, things=tuple(things))


# --- drawing: coordinates are pixels of the 64x64 picture, (0, 0) its upper left corner ---------------------

_SUPERSAMPLE = 4
_MARGIN = 2.5  # half a pixel more than promised: room for the antialiased edge
_GAP = 4.5
_RADII = {  # circumscribed, chosen so that the areas are comparable (about 150 to 300 px)
    "circle": (9.0, 10.5),
    "square": (10.0, 12.0),
    "triangle": (10.5, 12.0),
    "star": (10.5, 12.0),
    "cross": (10.0, 12.0),
    "ring": (9.5, 11.0),
}
_MAX_TILT = math.radians(12)
_JITTER = 8


def _unit_outlines() -> dict[str, np.ndarray]:
    """Corner points [N, 2] of the polygons inside the unit circle, y pointing down."""

    def polar(radii: Sequence[float], start: float) -> np.ndarray:
        angles = start + 2 * math.pi * np.arange(len(radii)) / len(radii)
        return np.stack([np.cos(angles), np.sin(angles)], 1) * np.asarray(radii)[:, None]

    a, b = 0.94, 0.34  # half length and half width of the cross's bars: a^2 + b^2 = 1
    arm = np.array([(b, -b), (a, -b), (a, b)])
    quarter_turn = np.array([(0.0, 1.0), (-1.0, 0.0)])
    arms = [arm @ np.linalg.matrix_power(quarter_turn, k) for k in range(4)]
    return {
        "square": polar([1] * 4, math.pi / 4),
        "triangle": polar([1] * 3, -math.pi / 2),
        "star": polar([1, 0.45] * 5, -math.pi / 2),
        "cross": np.concatenate(arms),
    }


_OUTLINES = _unit_outlines()
_RING_HOLE = 0.55  # inner over outer radius


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: tuple[float, float],
    radius: float,
    tilt: float,
    fill: tuple[int, int, int] | int,
    hole: tuple[int, int, int] | int = BACKGROUND,
) -> None:
    """Draw one filled shape; `centre` and `radius` in pixels of `draw`, `tilt` in radians."""
    x, y = centre
    if shape in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        if shape == "ring":
            r = radius * _RING_HOLE
            draw.ellipse((x - r, y - r, x + r, y + r), fill=hole)
        return
    cos, sin = math.cos(tilt) * radius, math.sin(tilt) * radius
    points = _OUTLINES[shape] @ np.array([(cos, sin), (-sin, cos)]) + (x, y)
    draw.polygon([tuple(point) for point in points.tolist()], fill=fill)


def render(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """A 64x64 RGB picture of the scene; layout, size, tilt and colour jitter come from `rng`."""
    things = [thing for thing in scene.things for _ in range(thing.count)]
    radii, centres = _counted_layout(things, rng) if scene.relation is None else _related_layout(scene, rng)
    picture = Image.new("RGB", (SIZE * _SUPERSAMPLE,) * 2, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    tilts = rng.uniform(-_MAX_TILT, _MAX_TILT, len(things))
    jitter = rng.integers(-_JITTER, _JITTER + 1, (len(things), 3))
    for thing, radius, (x, y), tilt, shift in zip(things, radii, centres, tilts, jitter, strict=True):
        r, g, b = np.clip(np.array(COLOURS[thing.colour]) + shift, 0, 255).tolist()
        centre = (float(x) * _SUPERSAMPLE, float(y) * _SUPERSAMPLE)
        draw_shape(draw, thing.shape, centre, float(radius) * _SUPERSAMPLE, float(tilt), (r, g, b))
    return picture.reduce(_SUPERSAMPLE)


def _draw_radii(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray:
    low, high = np.array([_RADII[thing.shape] for thing in things]).T
    return rng.uniform(low, high)


def _counted_layout(things: Sequence[Thing], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Radii [N] and centres [N, 2], anywhere in the picture, no two objects closer than the gap."""
    first, second = np.triu_indices(len(things), 1)
    while True:
        radii = _draw_radii(things, rng)
        edge = (_MARGIN + radii)[:, None]
        tries = rng.uniform(edge, SIZE - edge, (32, len(things), 2))
        distance = np.linalg.norm(tries[:, first] - tries[:, second], axis=-1)
        valid = np.flatnonzero((distance >= radii[first] + radii[second] + _GAP).all(1))
        if valid.size:
            return radii, tries[valid[0]]


def _related_layout(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Radii [2] and centres [2, 2]: at least 20 px apart on the relation's axis, at most 10 px off it."""
    radii = _draw_radii(scene.things, rng)
    axis = 0 if scene.relation in ("left of", "right of") else 1
    order = [0, 1] if scene.relation in ("left of", "above") else [1, 0]  # the left or upper one first
    near, far = _MARGIN + radii[order]
    reach = float(radii.sum())
    apart = rng.uniform(max(20.0, reach + _GAP), SIZE - 2 * _MARGIN - reach)
    start = rng.uniform(near, SIZE - far - apart)
    across = rng.uniform(near, SIZE - near)
    centres = np.empty((2, 2))
    centres[order, axis] = start, start + apart
    centres[order, 1 - axis] = across, np.clip(across + rng.uniform(-10, 10), far, SIZE - far)
    return radii, centres


# --- words --------------------------------------------------------------------------------------------------


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values)


_SINGULAR = {_plural(shape): shape for shape in SHAPES}


def _parse_thing(phrase: str) -> Thing:
    words = phrase.split()
    if len(words) != 3:
        raise ValueError(f"{phrase!r} is not '<count> <colour> <shape>'")
    count_word, colour, noun = words
    if count_word not in ("a", "an", *COUNTS):
        raise ValueError(f"{count_word!r} is not a count; choose from a, an, {_listed(tuple(COUNTS))}")
    count = COUNTS.get(count_word, 1)
    thing = Thing(_SINGULAR.get(noun, noun), colour, count)
    if (noun in _SINGULAR) != (count > 1):
        raise ValueError(f"{phrase!r} mixes singular and plural; did you mean {thing.phrase()!r}?")
    return thing
