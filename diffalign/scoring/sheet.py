"""The best and the worst pictures of each reward as one HTML file that needs nothing beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from jinja2 import Environment
from PIL import Image

from diffalign.errors import DataError
from diffalign.scoring.run import ScoredPictures, read_picture
from diffalign.scoring.sources import PictureSource

THUMBNAIL = 256
"""Longest side in pixels; smaller pictures keep their size."""


@dataclass(frozen=True)
class _Picture:
    thumbnail: str | None
    score: str
    prompt: str | None
    file: str
    others: list[str]


@dataclass(frozen=True)
class _Section:
    heading: str
    reward: str
    pictures: list[_Picture]


def score_sheet(
    pictures: PictureSource, scored: ScoredPictures, higher_is_better: Mapping[str, bool], most: int
) -> str:
    """A self-contained HTML page: by reward, pictures from best to worst, their scores and prompts.

    Args:
        pictures: read again, for thumbnails (embedded as JPEG of at most `THUMBNAIL` pixels a side).
        scored: their scores; skipped pictures do not appear.
        higher_is_better: by reward; False puts the lowest score first.
        most: pictures from each end; up to twice as many are shown whole.
    """

    @cache
    def thumbnail(index: int) -> str | None:
        try:
            return _data_uri(read_picture(pictures, index))
        except DataError:
            return None

    def entry(reward: str, index: int) -> _Picture:
        others = [f"{name} {_number(scored, name, index)}" for name in scored.scores if name != reward]
        return _Picture(
            thumbnail(index),
            _number(scored, reward, index),
            scored.prompts[index],
            scored.files[index],
            others,
        )

    sections = [
        _Section(heading, reward, [entry(reward, index) for index in chosen])
        for reward in scored.scores
        for heading, chosen in _ends(scored, reward, higher_is_better[reward], most)
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files(__package__).joinpath("sheet.html.jinja").read_text("utf-8"))
    return template.render(title=f"{len(scored.files)} pictures of {pictures.where}", sections=sections)


def _ends(
    scored: ScoredPictures, reward: str, higher_is_better: bool, most: int
) -> list[tuple[str, list[int]]]:
    """(heading, indices from best to worst) of one reward's sections."""
    column = scored.scores[reward]
    found = [(score, index) for index, score in enumerate(column) if score is not None]
    sign = -1 if higher_is_better else 1
    order = [index for _, index in sorted(found, key=lambda pair: (sign * pair[0], pair[1]))]
    if len(order) <= 2 * most:
        return [(f"{reward}: all {len(order)}, from best to worst", order)]
    return [
        (f"{reward}: the best {most} of {len(order)}", order[:most]),
        (f"{reward}: the worst {most} of {len(order)}", order[-most:]),
    ]


def _number(scored: ScoredPictures, reward: str, index: int) -> str:
    score = scored.scores[reward][index]
    return "" if score is None else f"{score:.4g}"


def _data_uri(picture: Image.Image) -> str:
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
