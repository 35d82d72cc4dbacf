"""The exact checker: it accepts what the renderer draws and nothing else."""

import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from diffalign.data.shapes import (
    BACKGROUND,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    corrupt,
    draw_scene,
    draw_shape,
    render,
)
from diffalign.data.shapes_verifier import UNKNOWN, detect, verify, verify_batch

SPLITS = ("train", "eval", "ood")
BLANK = Image.new("RGB", (SIZE, SIZE), BACKGROUND)


def decoder_like(picture: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """What a small VAE does to a picture: slightly blurred and noisy."""
    pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(0.7))) + rng.normal(0, 6, (SIZE, SIZE, 3))
    return np.clip(pixels.round(), 0, 255).astype(np.uint8)


def picture_of(*objects: tuple[str, str, tuple[float, float]], radius: float = 11.0) -> Image.Image:
    """Objects (shape, colour, centre) at exact places."""
    picture = Image.new("RGB", (SIZE * 4, SIZE * 4), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for shape, colour, (x, y) in objects:
        draw_shape(draw, shape, (4 * x, 4 * y), 4 * radius, 0.0, COLOURS[colour])
    return picture.reduce(4)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[Scene, Scene, Image.Image]]:
    """1000 scenes of all splits, each with one wrong description and its picture."""
    rng = np.random.default_rng(11)
    picked = [draw_scene(rng, SPLITS[i % 3]) for i in range(1000)]
    return [(scene, corrupt(scene, rng), render(scene, rng)) for scene in picked]


def test_renders_are_correct_and_corrupted_captions_are_not(drawn):
    accepted = [verify(picture, scene).correct for scene, _, picture in drawn]
    fooled = [verify(picture, wrong).correct for _, wrong, picture in drawn]
    assert np.mean(accepted) >= 0.99
    assert np.mean(fooled) <= 0.02


def test_blurred_and_noisy_renders_are_still_correct_and_corrupted_captions_still_not(drawn):
    rng = np.random.default_rng(12)
    rough = [(scene, wrong, decoder_like(picture, rng)) for scene, wrong, picture in drawn[:500]]
    accepted = [verify(picture, scene).correct for scene, _, picture in rough]
    fooled = [verify(picture, wrong).correct for _, wrong, picture in rough]
    assert np.mean(accepted) >= 0.97
    assert np.mean(fooled) <= 0.02


def test_the_score_is_one_exactly_when_correct_and_a_wrong_caption_scores_less(drawn):
    for scene, wrong, picture in drawn[:100]:
        right, mistaken = verify(picture, scene), verify(picture, wrong)
        assert (right.score == 1.0) == right.correct
        assert (mistaken.score == 1.0) == mistaken.correct
        assert 0.0 <= mistaken.score < right.score


@pytest.mark.parametrize("attribute", ["colour", "shape", "count", "relation"])
def test_each_kind_of_mistake_is_caught(attribute):
    rng = np.random.default_rng(13)
    scenes = [draw_scene(rng, "train") for _ in range(300)]
    if attribute in ("count", "relation"):
        scenes = [scene for scene in scenes if (scene.relation is None) == (attribute == "count")]
    scenes = scenes[:80]
    wrong = [verify(render(scene, rng), corrupt(scene, rng, attribute)).correct for scene in scenes]
    assert len(wrong) == 80
    assert np.mean(wrong) <= 0.02


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_colour_is_named_and_located(shape, colour):
    (found,) = detect(picture_of((shape, colour, (30.0, 36.0)), radius=10.5))
    assert (found.shape, found.colour) == (shape, colour)
    assert found.centre == pytest.approx((30.0, 36.0), abs=0.4)


def test_area_is_in_pixels():
    (disc,) = detect(picture_of(("circle", "white", (32, 32)), radius=10))
    assert disc.area == pytest.approx(np.pi * 100, rel=0.05)


def test_a_blank_picture_has_no_objects_and_scores_zero():
    for scene in ("a red star", "three red stars", "a red star above a blue circle"):
        verdict = verify(BLANK, scene)
        assert not verdict.correct
        assert verdict.score == 0.0
        assert verdict.detections == ()


def test_pure_noise_is_never_correct():
    rng = np.random.default_rng(14)
    for _ in range(10):
        noise = rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
        assert verify(noise, "a red star").score < 0.5


def test_an_extra_object_makes_a_picture_incorrect():
    pair = [("star", "red", (16, 16)), ("circle", "blue", (16, 46))]
    assert verify(picture_of(*pair), "a red star above a blue circle").correct
    crowded = verify(picture_of(*pair, ("ring", "white", (46, 32))), "a red star above a blue circle")
    assert not crowded.correct
    assert crowded.score == pytest.approx((0.5 + 1 + 1 + 1 + 1) / 5)  # count: 1 - |3 - 2| / 2


def test_a_speck_is_not_an_object_but_a_small_blob_is():
    pixels = np.asarray(picture_of(("star", "red", (20, 20)))).copy()
    pixels[50:54, 50:54] = COLOURS["green"]  # 16 px
    assert verify(pixels, "a red star").correct
    pixels[50:56, 50:56] = COLOURS["green"]  # 36 px
    assert not verify(pixels, "a red star").correct


def test_partial_credit_is_the_mean_of_its_parts():
    picture = picture_of(("star", "red", (16, 32)), ("circle", "blue", (48, 32)))
    parts = {  # count, colours, shapes, both together, relation
        "a red star left of a green circle": (1, 0.5, 1, 0.5, 1),
        "a red star right of a blue circle": (1, 1, 1, 1, 0),
        "a white ring left of a blue circle": (1, 0.5, 0.5, 0.5, 0),  # nothing resembles a white ring
        "a blue star left of a red circle": (1, 1, 1, 0, 0.5),  # two equally good pairs, one in the relation
        "two red stars": (1, 0.5, 0.5, 0.5),
        "three white rings": (2 / 3, 0, 0, 0),
    }
    for caption, expected in parts.items():
        assert verify(picture, caption).score == pytest.approx(sum(expected) / len(expected)), caption


@pytest.mark.parametrize("relation", RELATIONS)
def test_only_the_shown_relation_holds(relation):
    rng = np.random.default_rng(15)
    scene = Scene((Thing("square", "white"), Thing("cross", "purple")), relation)
    picture = render(scene, rng)
    holding = [other for other in RELATIONS if verify(picture, replace(scene, relation=other)).correct]
    assert holding == [relation]


def test_the_inverse_phrasing_gets_the_same_verdict():
    picture = picture_of(("star", "red", (32, 16)), ("circle", "blue", (32, 46)))
    told, inverse = "a red star above a blue circle", "a blue circle below a red star"
    assert verify(picture, told) == verify(picture, inverse)


def test_a_diagonal_arrangement_of_more_than_45_degrees_does_not_count_as_above():
    picture = picture_of(("star", "red", (14, 22)), ("circle", "blue", (48, 44)))
    assert not verify(picture, "a red star above a blue circle").correct
    assert verify(picture, "a red star left of a blue circle").correct


@pytest.mark.parametrize("gap", [0, 1])
def test_touching_objects_of_different_colours_are_told_apart(gap):
    rng = np.random.default_rng(16)
    names = tuple(COLOURS)
    for first, second in zip(names, names[1:] + names[:1], strict=True):
        picture = picture_of(("circle", first, (20, 32)), ("circle", second, (42 + gap, 32)))
        assert verify(decoder_like(picture, rng), f"a {first} circle left of a {second} circle").correct


def polygon(*corners: tuple[float, float]) -> Image.Image:
    picture = Image.new("RGB", (SIZE * 4, SIZE * 4), BACKGROUND)
    ImageDraw.Draw(picture).polygon([(4 * x, 4 * y) for x, y in corners], fill=COLOURS["yellow"])
    return picture.reduce(4)


@pytest.mark.parametrize(
    "corners",
    [
        [(20, 24), (44, 24), (44, 40), (20, 40)],  # a 3:2 rectangle
        [(32, 20), (44, 32), (32, 44), (20, 32)],  # a square on its corner
        [(20, 22), (44, 22), (32, 43)],  # a triangle upside down
        [(20, 20), (28, 20), (28, 36), (44, 36), (44, 44), (20, 44)],  # an L
        [(28, 20), (36, 20), (44, 42), (20, 42)],  # a trapezoid
    ],
)
def test_other_figures_are_unknown(corners):
    (found,) = detect(polygon(*corners))
    assert (found.shape, found.colour) == (UNKNOWN, "yellow")


def test_a_colour_between_two_of_the_palette_is_unknown():
    pixels = np.full((SIZE, SIZE, 3), BACKGROUND, np.uint8)
    pixels[20:40, 20:40] = (255, 120, 190)  # pink
    (found,) = detect(pixels)
    assert (found.shape, found.colour) == ("square", UNKNOWN)


def test_a_picture_on_a_white_background_is_not_correct():
    pixels = np.full((SIZE, SIZE, 3), 245, np.uint8)
    pixels[24:44, 24:44] = COLOURS["red"]
    assert not verify(pixels, "a red square").correct


def test_other_sizes_are_reduced_first():
    scene = "a green triangle above a cyan ring"
    picture = picture_of(("triangle", "green", (32, 16)), ("ring", "cyan", (32, 46)))
    for size in (128, 96, 256):
        large = picture.resize((size, size), Image.Resampling.BICUBIC)
        assert verify(large, scene).correct
        assert verify(np.asarray(large), scene).correct


@pytest.mark.parametrize(
    ("size", "dtype"), [((64, 64), "uint8"), ((64, 64, 3), "float64"), ((3, 64, 64), "uint8")]
)
def test_arrays_of_another_kind_are_refused(size, dtype):
    with pytest.raises(ValueError, match=r"expected a uint8 array \[H, W, 3\]"):
        detect(np.zeros(size, dtype))


def test_a_batch_gives_the_verdicts_of_its_pictures(drawn):
    captions = [scene.caption() for scene, _, _ in drawn[:20]]
    pictures = [picture for _, _, picture in drawn[:20]]
    expected = [verify(picture, caption) for picture, caption in zip(pictures, captions, strict=True)]
    assert verify_batch(pictures, captions) == expected
    assert verify_batch(np.stack([np.asarray(picture) for picture in pictures]), captions) == expected


def test_a_batch_names_the_caption_outside_the_grammar():
    with pytest.raises(ValueError, match=r"captions\[1\]: caption 'a photo of a cat' is outside"):
        verify_batch([BLANK, BLANK], ["a red star", "a photo of a cat"])


def test_a_batch_needs_one_caption_a_picture():
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        verify_batch([BLANK], ["a red star", "a red star"])


def test_a_verdict_takes_less_than_20_ms(drawn):
    verify(drawn[0][2], drawn[0][0])  # builds the templates
    start = time.process_time()
    for scene, _, picture in drawn[:50]:
        verify(picture, scene)
    assert (
        time.process_time() - start
    ) / 50 < 0.02  # 0.0015 on an idle core; the bound allows for a busy one
