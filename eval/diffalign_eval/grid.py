"""Pictures of several checkpoints side by side: a column per prompt, a row per checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

BACKGROUND = (250, 250, 248)
FRAME = (222, 222, 218)
INK = (38, 40, 46)
MUTED = (112, 115, 122)
_CAPTION_LINES = 4
_LABEL_WIDTH = 150


@dataclass(frozen=True)
class _Layout:
    """Pixel positions; everything scales with the cell."""

    cell: int
    margin: int
    gap: int
    label: int
    title: int
    header: int
    score: int

    def left(self, column: int) -> int:
        return self.margin + self.label + column * (self.cell + self.gap)

    def top(self, row: int) -> int:
        return self.margin + self.title + self.header + row * (self.cell + self.score + self.gap)

    def size(self, rows: int, columns: int) -> tuple[int, int]:
        return self.left(columns) - self.gap + self.margin, self.top(rows) - self.gap + self.margin


def picture_grid(
    rows: Mapping[str, Sequence[Image.Image]],
    captions: Sequence[str],
    scores: Mapping[str, Sequence[float]] | None = None,
    *,
    title: str | None = None,
    score_name: str = "",
    cell: int = 176,
) -> Image.Image:
    """Draw one grid.

    Args:
        rows: label (a checkpoint) -> one picture per column; column i of every row shares prompt and seed.
        captions: prompt of each column, wrapped over it.
        scores: label -> one number per column, printed under its picture; rows may be left out.
        title: a line over the grid.
        score_name: printed before each score.
        cell: side of a picture in pixels; smaller and larger pictures are resampled to fit (Lanczos).

    Raises:
        ValueError: no rows or columns, or rows, captions and scores of different length.
    """
    scores = scores or {}
    _check(rows, captions, scores)
    words = "".join([title or "", score_name, *rows, *captions])
    text, small, large = (_font(words, cell * share) for share in (0.085, 0.08, 0.11))
    line = _line_height(text)
    printed = _printed(scores, score_name)
    wrapped = [_wrap(caption, text, cell, _CAPTION_LINES) for caption in captions]
    labels = {name: _wrap(name, text, _LABEL_WIDTH, _CAPTION_LINES) for name in rows}
    gap = round(cell * 0.08)
    label = gap + round(max(text.getlength(part) for lines in labels.values() for part in lines))
    heading = _wrap(title or "", large, label + len(captions) * (cell + gap) - gap, _CAPTION_LINES)
    layout = _Layout(
        cell=cell,
        margin=round(cell * 0.12),
        gap=gap,
        label=label,
        title=(len(heading) + 1) * _line_height(large) if title else 0,
        header=max(len(lines) for lines in wrapped) * line + gap // 2,
        score=_line_height(small) + gap // 4 if scores else 0,
    )
    canvas = Image.new("RGB", layout.size(len(rows), len(captions)), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    _draw_lines(draw, (layout.margin, layout.margin), heading, large, INK)
    for column, lines in enumerate(wrapped):
        bottom = layout.top(0) - gap // 2
        _draw_lines(draw, (layout.left(column), bottom - len(lines) * line), lines, text, INK)
    for row, (name, pictures) in enumerate(rows.items()):
        middle = layout.top(row) + (cell - len(labels[name]) * line) // 2
        _draw_lines(draw, (layout.margin, middle), labels[name], text, INK)
        for column, picture in enumerate(pictures):
            corner = (layout.left(column), layout.top(row))
            _paste(canvas, picture, corner, cell)
            if name in printed:
                under = (corner[0] + cell / 2, corner[1] + cell + gap // 4)
                draw.text(under, printed[name][column], MUTED, small, anchor="ma")
    return canvas


def _check(
    rows: Mapping[str, Sequence[Image.Image]], captions: Sequence[str], scores: Mapping[str, Sequence[float]]
) -> None:
    if not rows or not captions:
        raise ValueError("a grid needs at least one row and one caption")
    unknown = sorted(set(scores) - set(rows))
    if unknown:
        raise ValueError(f"scores name rows that are not there: {', '.join(unknown)}")
    for what, lengths in (
        ("pictures", {name: len(pictures) for name, pictures in rows.items()}),
        ("scores", {name: len(values) for name, values in scores.items()}),
    ):
        for name, length in lengths.items():
            if length != len(captions):
                raise ValueError(f"row {name!r} has {length} {what} for {len(captions)} captions")


def _font(words: str, size: float) -> Font:
    """Pillow's own font; it knows ASCII only, so any other text is set in matplotlib's DejaVu Sans."""
    if words.isascii():
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _printed(scores: Mapping[str, Sequence[float]], name: str) -> dict[str, list[str]]:
    """All scores with the same number of decimals: none for whole numbers, else three significant digits."""
    finite = [float(score) for row in scores.values() for score in row if math.isfinite(score)]
    whole = all(map(float.is_integer, finite))
    decimals = 0 if whole else min(6, max(0, 2 - math.floor(math.log10(max(map(abs, finite))))))
    return {label: [f"{name} {score:.{decimals}f}".strip() for score in row] for label, row in scores.items()}


def _line_height(font: Font) -> int:
    _left, top, _right, bottom = font.getbbox("Ágjy")
    return round((bottom - top) * 1.25)


def _wrap(text: str, font: Font, width: int, most_lines: int) -> list[str]:
    """Word wrap by measured width; a word wider than a line is cut, what does not fit becomes an ellipsis."""
    lines = [""]
    for word in text.split():
        candidate = f"{lines[-1]} {word}".strip()
        if font.getlength(candidate) <= width:
            lines[-1] = candidate
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    while last and font.getlength(last + "...") > width:
        last = last[:-1]
    return [*lines[: most_lines - 1], last.rstrip() + "..."]


def _draw_lines(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    lines: Sequence[str],
    font: Font,
    ink: tuple[int, int, int],
) -> None:
    for number, line in enumerate(lines):
        draw.text((corner[0], corner[1] + number * _line_height(font)), line, ink, font)


def _paste(canvas: Image.Image, picture: Image.Image, corner: tuple[int, int], cell: int) -> None:
    """The picture at its own aspect ratio, centred in its cell, with a hairline frame."""
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)
    left, top = corner[0] + (cell - size[0]) // 2, corner[1] + (cell - size[1]) // 2
    canvas.paste(fitted, (left, top))
    ImageDraw.Draw(canvas).rectangle((left, top, left + size[0] - 1, top + size[1] - 1), outline=FRAME)
