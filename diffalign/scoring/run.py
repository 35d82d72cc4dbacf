"""Scores of a set of pictures: chunk by chunk, unreadable pictures left out, known scores used again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from PIL import Image

from diffalign.data.textfiles import listed
from diffalign.errors import DataError
from diffalign.images import open_image
from diffalign.rewards import NonFiniteScore, RewardMixture
from diffalign.scoring.journal import Journal, picture_keys
from diffalign.scoring.sources import PictureSource

CHUNK = 256
"""Most pictures in memory at once."""

CHUNK_PIXELS = 128 * 10**6
"""A chunk ends with the picture that reaches this; as 8-bit RGB it is 384 MB."""

_SHOWN = 200
"""Characters of a prompt in an error message."""


@dataclass(frozen=True)
class ScoredPictures:
    """One entry a picture, in the order of its source."""

    files: list[str]
    prompts: list[str | None]
    scores: dict[str, list[float | None]]
    """By reward; None for pictures that were skipped."""
    skipped: dict[int, str]
    """Index of a picture that could not be read -> why."""


def score_pictures(
    pictures: PictureSource,
    prompts: Sequence[str | None],
    mixture: RewardMixture,
    journal: Journal | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ScoredPictures:
    """Score every picture that can be read.

    Args:
        pictures: where they are.
        prompts: one a picture; None is given to the rewards as "".
        mixture: the rewards; its weights play no part.
        journal: scores of an earlier run, used again; gets every chunk's scores as they come.
        on_progress: told how many pictures are done (scored, skipped or known), of all.

    Raises:
        DataError: none of the pictures can be read.
        NumericsError: a score is not finite; the picture's file and prompt are named.
        RewardError, DeviceError: a reward failed. What was scored before is in the journal.
    """
    keys = picture_keys(pictures, prompts) if journal else list(map(str, range(len(pictures.files))))
    known = journal.scores if journal else {}
    skipped: dict[int, str] = {}
    scored = 0
    pending = [index for index, key in enumerate(keys) if key not in known]
    size = min(CHUNK, max(reward.batch_size for reward in mixture.rewards.values()))
    for chunk in _chunks(pictures, pending, size, skipped):
        indices = list(chunk)
        columns = _score(pictures, prompts, mixture, chunk)
        rows = [[column[row] for column in columns] for row in range(len(indices))]
        if journal:
            journal.append([(keys[i], pictures.files[i], row) for i, row in zip(indices, rows, strict=True)])
        else:
            known |= {keys[i]: row for i, row in zip(indices, rows, strict=True)}
        scored += len(indices)
        on_progress(len(keys) - len(pending) + scored + len(skipped))
    if len(skipped) == len(keys):
        reasons = [f"{pictures.files[index]}: {reason}" for index, reason in skipped.items()]
        raise DataError(f"none of the {len(keys)} pictures can be read", where=listed(reasons))
    scores = {
        label: [known[key][column] if key in known else None for key in keys]
        for column, label in enumerate(mixture.labels)
    }
    return ScoredPictures(list(pictures.files), list(prompts), scores, skipped)


def read_picture(pictures: PictureSource, index: int) -> Image.Image:
    """Picture `index`, 8-bit RGB and upright; DataError where that cannot be."""
    return open_image(pictures.source(index), pictures.files[index])


def _chunks(
    pictures: PictureSource, pending: Sequence[int], size: int, skipped: dict[int, str]
) -> Iterator[dict[int, Image.Image]]:
    """Readable pictures by index, at most `size` and about `CHUNK_PIXELS` at once; the others go to `skipped`."""
    chunk: dict[int, Image.Image] = {}
    pixels = 0
    for index in pending:
        try:
            picture = read_picture(pictures, index)
        except DataError as error:
            skipped[index] = f"{error.what}: {error.why}" if error.why else error.what
            continue
        chunk[index] = picture
        pixels += picture.width * picture.height
        if len(chunk) == size or pixels >= CHUNK_PIXELS:
            yield chunk
            chunk, pixels = {}, 0
    if chunk:
        yield chunk


def _score(
    pictures: PictureSource,
    prompts: Sequence[str | None],
    mixture: RewardMixture,
    chunk: dict[int, Image.Image],
) -> list[list[float]]:
    """One list a reward, one score a picture of the chunk."""
    try:
        components = mixture(list(chunk.values()), [prompts[index] or "" for index in chunk]).components
    except NonFiniteScore as error:
        index = list(chunk)[error.index]
        prompt = prompts[index] or ""
        shown = prompt if len(prompt) <= _SHOWN else prompt[:_SHOWN] + "..."
        error.where = f"{pictures.files[index]} of {pictures.where}, prompt {shown!r}"
        raise
    return [components[label].tolist() for label in mixture.labels]
