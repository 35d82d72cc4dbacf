"""Text in pictures against the text that prompts quote."""

from __future__ import annotations

import sys

import pytest
import torch
from diffalign_rewards.ocr import agreement, edit_distance, quoted_text
from PIL import Image, ImageDraw, ImageFont
from torch.testing import assert_close

from diffalign.errors import DataError, RewardError
from diffalign.images import to_tensor
from diffalign.rewards import load_reward


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("abc", "abc", 0),
        ("ab", "ba", 2),
        ("open", "opn", 1),
    ],
)
def test_edit_distance_counts_the_fewest_changes(first: str, second: str, distance: int):
    assert edit_distance(first, second) == distance


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("OPEN", "open", 1.0),
        ("Grand Open ing", "grandopening", 1.0),
        ("OPN", "OPEN", 0.75),  # one of four letters is missing
        ("", "OPEN", 0.0),
        ("something else entirely", "OPEN", 0.0),  # more than four changes count as four
        ("OPEN 24", "OPEN", 0.5),  # two letters too many
    ],
)
def test_agreement_is_one_minus_the_share_of_changes(read: str, wanted: str, score: float):
    assert agreement(read, wanted) == score


def test_the_quoted_text_is_found():
    assert quoted_text('a sign that says "OPEN now"') == "OPEN now"
    assert quoted_text("a book titled “Dune” beside a cup that says «tea»") == "Dunetea"
    assert quoted_text('a dog\'s "bone"') == "bone"


@pytest.mark.parametrize(
    "prompt", ["a cat", "a dog's dinner isn't", 'an empty ""', 'only spaces "  "', 'one "quote']
)
def test_a_prompt_without_quoted_text_is_named(prompt: str):
    with pytest.raises(DataError, match="finds no quoted text") as error:
        quoted_text(prompt)
    assert repr(prompt) in str(error.value)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(RewardError, match="needs RapidOCR") as error:
        load_reward("ocr")
    assert error.value.hint == "pip install 'diffalign[ocr]'"


def sign(*lines: str, size: tuple[int, int] = (320, 192)) -> Image.Image:
    picture = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((20, 20 + 80 * i), line, fill="black", font=ImageFont.load_default(size=48))
    return picture


def test_drawn_text_is_read():
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")
    reward = load_reward("ocr")
    pictures = [sign("HELLO"), sign("HELLO"), sign("GRAND", "OPENING"), sign(), sign("HELLO")]
    prompts = ['"hello"', 'a sign, "HELP"', 'a shop: "Grand Opening"', '"HELLO"', '"no"']
    # HELLO to HELP: one letter replaced and one left out, of four; to "no": more changes than its two letters
    expected = torch.tensor([1.0, 0.5, 1.0, 0.0, 0.0])
    assert_close(reward(pictures, prompts), expected)
    assert_close(reward(to_tensor(pictures), prompts), expected)
    assert_close(torch.cat([reward([p], [q]) for p, q in zip(pictures, prompts, strict=True)]), expected)
    with pytest.raises(DataError, match="finds no quoted text"):
        reward(pictures[:1], ["a sign"])
