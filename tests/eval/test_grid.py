"""The grid: every picture where it belongs, text inside its column."""

from __future__ import annotations

import numpy as np
import pytest
from diffalign_eval.grid import BACKGROUND, picture_grid
from PIL import Image

COLOURS = {(row, column): (40 * row + 60, 30 * column + 20, 200) for row in range(2) for column in range(3)}
CAPTIONS = ["a red star", "two blue circles above a very green square", "x" * 90]


def plain(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def two_rows() -> dict[str, list[Image.Image]]:
    return {
        name: [plain(COLOURS[row, column]) for column in range(3)]
        for row, name in enumerate(["before", "after"])
    }


def box(grid: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """left, top, right, bottom (inclusive) of the pixels of exactly this colour."""
    rows, columns = np.nonzero((np.asarray(grid) == colour).all(axis=-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_columns_are_prompts_and_rows_are_checkpoints():
    grid = picture_grid(two_rows(), CAPTIONS)
    boxes = {place: box(grid, colour) for place, colour in COLOURS.items()}
    for row in range(2):
        assert boxes[row, 0][2] < boxes[row, 1][0] < boxes[row, 1][2] < boxes[row, 2][0]
    for column in range(3):
        assert boxes[0, column][0] == boxes[1, column][0]
        assert boxes[0, column][3] < boxes[1, column][1]


def test_small_pictures_fill_the_cell_but_for_the_hairline():
    left, top, right, bottom = box(picture_grid(two_rows(), CAPTIONS, cell=100), COLOURS[0, 0])
    assert (right - left + 1, bottom - top + 1) == (98, 98)


def test_a_wide_picture_keeps_its_shape():
    grid = picture_grid({"a": [plain((200, 10, 10), (512, 256))]}, ["wide"], cell=100)
    left, top, right, bottom = box(grid, (200, 10, 10))
    assert (right - left + 1, bottom - top + 1) == (98, 48)


def test_captions_stay_over_their_own_column():
    rows = two_rows()
    empty = np.asarray(picture_grid(rows, ["", "", "x " * 200]))
    full = np.asarray(picture_grid(rows, ["", CAPTIONS[2], "x " * 200]))
    changed = np.nonzero((empty != full).any(axis=(0, 2)))[0]
    left, _, right, _ = box(Image.fromarray(full), COLOURS[0, 1])
    assert changed.size
    assert left - 3 <= changed.min()  # a glyph may lean out of its advance box
    assert changed.max() <= right + 3


def test_scores_are_printed_between_their_pictures_and_the_next_row():
    rows = two_rows()
    scores = {"before": [1.5, 2.5, 3.5], "after": [1.5, 2.5, 3.5]}
    plain_grid = np.asarray(picture_grid(rows, CAPTIONS, scores))
    boxes = {place: box(Image.fromarray(plain_grid), colour) for place, colour in COLOURS.items()}
    below = {"before": boxes[1, 1][1], "after": plain_grid.shape[0]}
    for row, name in enumerate(rows):
        changed = picture_grid(rows, CAPTIONS, scores | {name: [1.5, 8.5, 3.5]})
        ys, xs = np.nonzero((plain_grid != np.asarray(changed)).any(axis=-1))
        left, _, right, bottom = boxes[row, 1]
        assert ys.size
        assert bottom < ys.min() <= ys.max() < below[name] - 8
        assert left < xs.min() <= xs.max() < right


def test_the_grid_is_the_same_every_time_and_keeps_a_margin():
    grids = [np.asarray(picture_grid(two_rows(), CAPTIONS, title="Before and after " * 9)) for _ in range(2)]
    assert (grids[0] == grids[1]).all()
    for edge in (grids[0][:4], grids[0][-4:], grids[0][:, :4], grids[0][:, -4:]):
        assert (edge == BACKGROUND).all()


def test_a_prompt_in_another_script_is_not_a_row_of_boxes():
    def ink(caption: str) -> np.ndarray:
        return np.asarray(picture_grid({"a": [plain((200, 10, 10))]}, [caption]))

    assert (ink("ä") != ink("ж")).any()  # Pillow's own font draws the same box for both


@pytest.mark.parametrize(
    ("rows", "captions", "scores", "message"),
    [
        ({}, ["a"], None, "at least one row"),
        ({"a": []}, [], None, "at least one row and one caption"),
        ({"a": [plain((0, 0, 0))]}, ["x", "y"], None, "row 'a' has 1 pictures for 2 captions"),
        ({"a": [plain((0, 0, 0))]}, ["x"], {"a": []}, "row 'a' has 0 scores for 1 captions"),
        ({"a": [plain((0, 0, 0))]}, ["x"], {"b": [1.0]}, "rows that are not there: b"),
    ],
)
def test_a_grid_with_holes_is_refused(rows, captions, scores, message: str):
    with pytest.raises(ValueError, match=message):
        picture_grid(rows, captions, scores)
