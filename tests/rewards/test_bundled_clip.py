"""The bundled CLIP and its aesthetic head: learned on the Shapes world, useful, and not to be trusted blindly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffalign_rewards.aesthetic import AestheticReward
from diffalign_rewards.clip import CLIPReward
from PIL import Image, ImageDraw

from diffalign.assets import resolve
from diffalign.data.shapes import (
    BACKGROUND,
    COLOURS,
    SHAPES,
    SIZE,
    Attribute,
    Scene,
    corrupt,
    draw_prompts,
    draw_scene,
    draw_shape,
    render,
)
from diffalign.images import to_tensor
from diffalign.rewards import load_reward

WARM, COLD = ("red", "orange", "yellow"), ("cyan", "blue", "purple")
PICTURES = 100


@pytest.fixture(scope="module")
def clip() -> CLIPReward:
    reward = load_reward("clip", checkpoint="bundled:clip")
    assert isinstance(reward, CLIPReward)
    return reward


@pytest.fixture(scope="module")
def aesthetic() -> AestheticReward:
    reward = load_reward("aesthetic", checkpoint="bundled:clip", head="bundled:clip/aesthetic.safetensors")
    assert isinstance(reward, AestheticReward)
    return reward


def preferred(clip: CLIPReward, attribute: Attribute | None) -> float:
    """How many of 100 fresh pictures score higher with their own caption than with a wrong one."""
    rng = np.random.default_rng(7)
    scenes: list[Scene] = []
    while len(scenes) < PICTURES:
        scene = draw_scene(rng, "eval")
        if attribute not in ("count", "relation") or (scene.relation is None) == (attribute == "count"):
            scenes.append(scene)
    pictures = [render(scene, rng) for scene in scenes]
    true = [scene.caption(int(rng.integers(scene.phrasings))) for scene in scenes]
    rivals = [corrupt(scene, rng, attribute) for scene in scenes]
    wrong = [rival.caption(int(rng.integers(rival.phrasings))) for rival in rivals]
    return (clip(pictures, true) > clip(pictures, wrong)).sum().item()


def still_life(
    colours: tuple[str, ...], place: Callable[[np.random.Generator], float], seed: int
) -> Image.Image:
    """One object of one of the colours, its centre's coordinates drawn by `place`, in pixels."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGB", (4 * SIZE, 4 * SIZE), BACKGROUND)
    shape, colour = SHAPES[rng.integers(len(SHAPES))], colours[rng.integers(len(colours))]
    centre = (4 * place(rng), 4 * place(rng))
    draw_shape(ImageDraw.Draw(picture), shape, centre, 4 * 11.0, 0.0, COLOURS[colour])
    return picture.reduce(4)


def at_the_centre(rng: np.random.Generator) -> float:
    return SIZE / 2


def in_a_corner(rng: np.random.Generator) -> float:
    return float(rng.choice([14.0, SIZE - 14.0]))


def test_folder_is_complete_and_under_3_MB():
    files = {file.name: file.stat().st_size for file in resolve("bundled:clip").iterdir()}
    assert set(files) == {
        "README.md",
        "aesthetic.safetensors",
        "open_clip_config.json",
        "open_clip_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 3e6


def test_weights_stored_in_half_precision_are_read_as_float32(clip: CLIPReward):
    assert {weight.dtype for weight in clip.backbone.model.parameters()} == {torch.float32}
    assert resolve("bundled:clip/open_clip_model.safetensors").stat().st_size < 2.2 * clip.parameters


def test_no_caption_of_the_world_is_too_long(clip: CLIPReward):
    captions = draw_prompts(500, "train", seed=1) + draw_prompts(500, "ood", seed=1)
    assert clip.backbone.embed_texts(captions).isfinite().all()  # a cut caption would warn, which is an error


def test_clip_prefers_the_true_caption_often_but_not_always(clip: CLIPReward):
    assert 70 <= preferred(clip, None) < PICTURES


@pytest.mark.parametrize(
    ("attribute", "least"), [("colour", 95), ("count", 90), ("shape", 80), ("relation", 70)]
)
def test_clip_knows_every_attribute_better_than_chance(clip: CLIPReward, attribute: Attribute, least: int):
    assert preferred(clip, attribute) >= least  # chance is 50 +- 5


def test_clip_scores_are_cosines_with_gradients_to_the_pixels(clip: CLIPReward):
    rng = np.random.default_rng(8)
    scenes = [draw_scene(rng, "ood") for _ in range(8)]
    pictures = to_tensor([render(scene, rng) for scene in scenes]).requires_grad_()
    scores = clip(pictures, [scene.caption() for scene in scenes])
    assert scores.abs().max() <= 1 + 1e-6
    assert scores.std() > 0.01
    (gradient,) = torch.autograd.grad(scores.sum(), pictures)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).norm(dim=1) > 0).all()


def test_aesthetic_ranks_warm_and_centred_over_cold_and_off_centre(aesthetic: AestheticReward):
    liked = aesthetic([still_life(WARM, at_the_centre, seed) for seed in range(20)], [""] * 20)
    disliked = aesthetic([still_life(COLD, in_a_corner, seed) for seed in range(20)], [""] * 20)
    assert liked.min() > disliked.max()


@pytest.mark.parametrize("colours", [WARM, COLD])
def test_aesthetic_likes_the_same_object_better_at_the_centre(aesthetic: AestheticReward, colours):
    centred = aesthetic([still_life(colours, at_the_centre, seed) for seed in range(40)], [""] * 40)
    cornered = aesthetic([still_life(colours, in_a_corner, seed) for seed in range(40)], [""] * 40)
    assert (centred - cornered).mean() > 0.5  # the taste it learned from: 9 * 0.25 * (25 px / 32 px) = 1.8


def test_aesthetic_scores_of_the_world_lie_between_1_and_10(aesthetic: AestheticReward):
    rng = np.random.default_rng(9)
    scores = aesthetic([render(draw_scene(rng, "ood"), rng) for _ in range(100)], [""] * 100)
    assert scores.min() >= 1
    assert scores.max() <= 10
    assert scores.std() > 0.3
