"""The HTML sheet: sorted, capped, escaped, and complete in itself."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from diffalign.scoring.run import ScoredPictures
from diffalign.scoring.sheet import THUMBNAIL, score_sheet
from diffalign.scoring.sources import PictureSource, open_pictures

SHADES = [30, 10, 50, 20, 40]


@pytest.fixture
def pictures(tmp_path: Path) -> PictureSource:
    for i, shade in enumerate(SHADES):
        Image.new("RGB", (600, 300), (shade,) * 3).save(tmp_path / f"{i} & <b>.png")
    return open_pictures([str(tmp_path)])


def scored(pictures: PictureSource, prompts: list[str | None] | None = None) -> ScoredPictures:
    shades: list[float | None] = [float(shade) for shade in SHADES]
    return ScoredPictures(pictures.files, prompts or [None] * 5, {"shade": shades}, {})


def shades(page: str) -> list[list[int]]:
    """Of the embedded pictures, a list a section."""
    found = []
    for section in page.split("<h2>")[1:]:
        sources = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', section)
        images = [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]
        assert all(image.size == (THUMBNAIL, THUMBNAIL // 2) for image in images)
        found.append([round(image.getpixel((5, 5))[0] / 10) * 10 for image in images])
    return found


def test_best_and_worst_are_sorted_and_capped(pictures: PictureSource):
    assert shades(score_sheet(pictures, scored(pictures), {"shade": True}, 2)) == [[50, 40], [20, 10]]
    assert shades(score_sheet(pictures, scored(pictures), {"shade": False}, 2)) == [[10, 20], [40, 50]]
    # five pictures are at most 2 x 3: none is shown twice
    page = score_sheet(pictures, scored(pictures), {"shade": True}, 3)
    assert shades(page) == [[50, 40, 30, 20, 10]]
    assert "all 5, from best to worst" in page


def test_prompts_and_names_are_escaped_and_nothing_is_fetched(pictures: PictureSource):
    prompts: list[str | None] = [
        "<script>alert(1)</script>",
        '"><img src=x>',
        "{{ 7 * 7 }}",
        "x" * 10_000,
        None,
    ]
    page = score_sheet(pictures, scored(pictures, prompts), {"shade": True}, 5)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<img src=x" not in page
    assert "{{ 7 * 7 }}" in page
    assert "0 &amp; &lt;b&gt;.png" in page
    assert "http" not in page
    assert set(re.findall(r'(?:src|href)="([^,]{0,20})', page)) == {"data:image/jpeg;base"}


def test_skipped_pictures_do_not_appear_and_lost_ones_say_so(pictures: PictureSource, tmp_path: Path):
    (tmp_path / "2 & <b>.png").unlink()
    some: list[float | None] = [30.0, None, 50.0, 20.0, 40.0]
    result = ScoredPictures(pictures.files, [None] * 5, {"shade": some, "other": some}, {1: "damaged"})
    page = score_sheet(pictures, result, {"shade": True, "other": True}, 5)
    assert shades(page) == [[40, 30, 20]] * 2
    assert page.count("can no longer be read") == 2
    assert "1 &amp; &lt;b&gt;.png" not in page
    assert "other 40" in page
