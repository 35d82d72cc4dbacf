"""The Shapes world: captions, splits and the renderer."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from diffalign.data.shapes import (
    BACKGROUND,
    COLOURS,
    INVERSE,
    RELATIONS,
    SHAPES,
    SIZE,
    Scene,
    Thing,
    corrupt,
    draw_prompts,
    draw_scene,
    is_held_out,
    parse_caption,
    render,
    scenes,
    split,
)

SPLITS = ("train", "eval", "ood")
ALL_SCENES = [scene for name in SPLITS for kind in scenes(name) for scene in kind]
RED_STAR_ABOVE_BLUE_CIRCLE = Scene((Thing("star", "red"), Thing("circle", "blue")), "above")


def test_every_phrasing_of_every_scene_parses_back_to_the_scene():
    for scene in ALL_SCENES:
        assert scene.phrasings >= 4
        for phrasing in range(scene.phrasings):
            assert parse_caption(scene.caption(phrasing)) == scene.canonical()


def test_the_phrasings_of_a_scene_are_distinct_and_lower_case():
    for scene in ALL_SCENES[::50]:
        captions = [scene.caption(phrasing) for phrasing in range(scene.phrasings)]
        assert len(set(captions)) == len(captions)
        assert all(caption == caption.lower() for caption in captions)


@pytest.mark.parametrize(
    ("scene", "phrasing", "caption"),
    [
        (RED_STAR_ABOVE_BLUE_CIRCLE, 0, "a red star above a blue circle"),
        (RED_STAR_ABOVE_BLUE_CIRCLE, 1, "a blue circle below a red star"),
        (RED_STAR_ABOVE_BLUE_CIRCLE, 2, "there is a red star above a blue circle"),
        (RED_STAR_ABOVE_BLUE_CIRCLE, 4, "a picture of a red star above a blue circle"),
        (RED_STAR_ABOVE_BLUE_CIRCLE, 7, "an image with a blue circle below a red star"),
        (Scene((Thing("star", "orange"),)), 0, "an orange star"),
        (Scene((Thing("star", "orange"),)), 3, "an image with one orange star"),
        (Scene((Thing("cross", "cyan", 3),)), 0, "three cyan crosses"),
        (Scene((Thing("ring", "white", 2),)), 1, "there are two white rings"),
    ],
)
def test_captions_read_as_english(scene, phrasing, caption):
    assert scene.caption(phrasing) == caption


def test_a_phrasing_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="this scene has 0 to 7"):
        RED_STAR_ABOVE_BLUE_CIRCLE.caption(8)


def test_parsing_forgives_case_spaces_full_stop_and_the_wrong_article():
    assert parse_caption("  A  Red STAR above an blue circle. ") == RED_STAR_ABOVE_BLUE_CIRCLE


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a red hexagon", "'hexagon' is not a shape"),
        ("a pink star", "'pink' is not a colour"),
        ("four red stars", "'four' is not a count"),
        ("two red star", "did you mean 'two red stars'"),
        ("a red stars", "did you mean 'a red star'"),
        ("a red star near a blue circle", "is not '<count> <colour> <shape>'"),
        ("two red stars above a blue circle", "joins exactly two Things of count 1"),
        ("a red star above a red star", "two equal things"),
        ("a red star.. above", "is not '<count> <colour> <shape>'"),
        ("", "is not '<count> <colour> <shape>'"),
    ],
)
def test_text_outside_the_grammar_is_refused_with_the_reason(text, reason):
    with pytest.raises(ValueError, match="outside the Shapes grammar") as caught:
        parse_caption(text)
    assert reason in str(caught.value)
    assert "Write for example" in str(caught.value)


@pytest.mark.parametrize(
    ("things", "relation"),
    [
        ((), None),
        ((Thing("star", "red"), Thing("ring", "red")), None),
        ((Thing("star", "red"),), "above"),
        ((Thing("star", "red"), Thing("ring", "red")), "near"),
    ],
)
def test_impossible_scenes_cannot_be_built(things, relation):
    with pytest.raises(ValueError, match=r"relation|Things"):
        Scene(things, relation)


def test_equivalent_scenes_are_equal_and_hash_alike_once_canonical():
    for relation in RELATIONS:
        star, ring = Thing("star", "red"), Thing("ring", "red")
        scene, mirrored = Scene((star, ring), relation), Scene((ring, star), INVERSE[relation])
        assert scene != mirrored
        assert len({scene.canonical(), mirrored.canonical()}) == 1
        assert split(scene) == split(mirrored)


def test_each_scene_is_in_exactly_one_split_and_none_is_missing():
    # 48 kinds x 3 counts, and 48 x 47 ordered pairs x 2 canonical relations.
    assert len(set(ALL_SCENES)) == len(ALL_SCENES) == 48 * 3 + 48 * 47 * 2
    for name in SPLITS:
        assert all(split(scene) == name for kind in scenes(name) for scene in kind)


def test_ood_scenes_are_exactly_those_with_a_held_out_combination():
    held_out = {(s, c) for i, s in enumerate(SHAPES) for j, c in enumerate(COLOURS) if (i + j) % 4 == 3}
    assert len(held_out) == 48 // 4
    for scene in ALL_SCENES:
        shows_one = any((thing.shape, thing.colour) in held_out for thing in scene.things)
        assert is_held_out(scene) == shows_one == (split(scene) == "ood")


def test_train_has_every_shape_colour_count_and_relation_and_four_fifths_of_the_domain():
    counted, related = scenes("train")
    things = [thing for scene in counted + related for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)
    assert {thing.count for thing in things} == {1, 2, 3}
    assert {scene.relation for scene in related} == {"left of", "above"}
    in_domain = 36 * 3 + 36 * 35 * 2
    assert 0.77 < (len(counted) + len(related)) / in_domain < 0.83


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'test' is not a split of Shapes; choose from train, eval, ood"):
        scenes("test")


@pytest.mark.parametrize("name", SPLITS)
def test_drawn_scenes_stay_in_their_split_and_two_fifths_are_counted(name):
    rng = np.random.default_rng(0)
    drawn = [draw_scene(rng, name) for _ in range(2000)]
    assert all(split(scene) == name for scene in drawn)
    counted = sum(scene.relation is None for scene in drawn) / 2000
    assert abs(counted - 0.4) < 4 * (0.24 / 2000) ** 0.5  # four standard deviations of a share of 0.4


def test_prompts_do_not_repeat_a_scene_before_the_split_is_used_up():
    size = sum(len(kind) for kind in scenes("eval"))
    prompts = [parse_caption(prompt) for prompt in draw_prompts(2 * size, "eval", seed=3)]
    assert all(split(scene) == "eval" for scene in prompts)
    assert len(set(prompts[:size])) == size
    assert set(Counter(prompts).values()) == {2}


def test_prompts_depend_on_the_seed_alone_even_in_another_process():
    prompts = draw_prompts(40, "train", seed=7)
    assert prompts == draw_prompts(40, "train", seed=7)
    assert prompts != draw_prompts(40, "train", seed=8)
    code = "from diffalign.data.shapes import draw_prompts; print(*draw_prompts(40, 'train', 7), sep='\\n')"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == prompts


def test_corrupting_changes_exactly_one_attribute():
    rng = np.random.default_rng(0)
    for scene in ALL_SCENES[::3]:
        wrong = corrupt(scene, rng)
        assert wrong.canonical() != scene.canonical()
        changes = (wrong.relation != scene.relation) + sum(
            (a.shape != b.shape) + (a.colour != b.colour) + (a.count != b.count)
            for a, b in zip(scene.things, wrong.things, strict=True)
        )
        assert changes == 1


def test_corrupting_an_attribute_the_scene_lacks_is_an_error():
    with pytest.raises(ValueError, match="has no count; choose from colour, shape, relation"):
        corrupt(RED_STAR_ABOVE_BLUE_CIRCLE, np.random.default_rng(0), "count")


def test_rendering_is_a_function_of_the_generator():
    def picture(seed: int) -> bytes:
        return render(RED_STAR_ABOVE_BLUE_CIRCLE, np.random.default_rng(seed)).tobytes()

    assert picture(0) == picture(0)
    assert picture(0) != picture(1)


def test_pictures_are_64_by_64_rgb_on_the_background_with_a_free_margin_of_2_px():
    rng = np.random.default_rng(1)
    for scene in ALL_SCENES[::20]:
        picture = render(scene, rng)
        assert (picture.size, picture.mode) == ((SIZE, SIZE), "RGB")
        pixels = np.asarray(picture)
        border = np.ones((SIZE, SIZE), bool)
        border[2:-2, 2:-2] = False
        assert (pixels[border] == BACKGROUND).all()
        assert (pixels != BACKGROUND).any()


def test_objects_keep_a_gap_of_4_px():
    # Objects grown by 1.5 px (a 4-px gap leaves 1 px free) are still as many as the scene has.
    label = pytest.importorskip("scipy.ndimage").label
    rng = np.random.default_rng(2)
    crowded = [scene for scene in ALL_SCENES if scene.count > 1][::20]
    for scene in crowded:
        lit = np.pad((np.asarray(render(scene, rng)) != BACKGROUND).any(-1), 1)
        grown = np.zeros((SIZE, SIZE), bool)
        for dy in range(3):
            for dx in range(3):
                grown |= lit[dy : dy + SIZE, dx : dx + SIZE]
        assert label(grown)[1] == scene.count


def test_areas_of_the_shapes_are_comparable():
    areas = []
    for shape in SHAPES:
        rng = np.random.default_rng(0)
        pictures = [np.asarray(render(Scene((Thing(shape, "white"),)), rng)) for _ in range(20)]
        areas.append(np.mean([(picture[..., 0] > 136).sum() for picture in pictures]))  # half way to white
    assert min(areas) > 120
    assert max(areas) / min(areas) < 2.5


def test_related_objects_are_clearly_apart_along_the_axis_and_nearly_level_across_it():
    rng = np.random.default_rng(5)
    for relation in RELATIONS:
        axis = 0 if relation in ("left of", "right of") else 1
        sign = 1 if relation in ("left of", "above") else -1
        scene = Scene((Thing("circle", "red"), Thing("ring", "cyan")), relation)
        for _ in range(50):
            pixels = np.asarray(render(scene, rng)).astype(int)
            red = np.argwhere(pixels[..., 0] - pixels[..., 2] > 60).mean(0)[::-1]
            cyan = np.argwhere(pixels[..., 2] - pixels[..., 0] > 60).mean(0)[::-1]
            offset = (cyan - red) * sign
            assert offset[axis] >= 19.5  # 20 in the layout; half a pixel for measuring on whole pixels
            assert abs(offset[1 - axis]) <= 10.5


def test_the_module_imports_without_torch():
    code = "import sys, diffalign.data.shapes_verifier; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
