"""One preprocessing for PIL pictures and for tensors."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import skimage.data
import torch
from diffalign_rewards.preprocessing import Preprocessing
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.testing import assert_close
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffalign.errors import RewardError
from diffalign.images import to_tensor

CLIP = {
    "size": 224,
    "mean": open_clip.OPENAI_DATASET_MEAN,
    "std": open_clip.OPENAI_DATASET_STD,
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}
PHOTOGRAPHS = ["astronaut", "chelsea", "coffee", "rocket"]


def photograph(name: str) -> Image.Image:
    return Image.fromarray(getattr(skimage.data, name)())


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("mode", ["shortest", "longest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_pil_path_is_exactly_open_clips_own_transform(name: str, mode: str, interpolation: str):
    cfg = CLIP | {"resize_mode": mode, "interpolation": interpolation}
    theirs = image_transform_v2(PreprocessCfg(**cfg), is_train=False)(photograph(name))
    assert_close(Preprocessing.from_open_clip(cfg).pictures([photograph(name)])[0], theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("size", [224, 448])
@pytest.mark.parametrize("side", [None, 64])
@pytest.mark.parametrize("mode", ["shortest", "longest"])
def test_tensor_path_is_within_half_a_level_of_the_pil_path(
    name: str, size: int, side: int | None, mode: str
):
    picture = photograph(name)
    if side:  # upscaling, as for the pictures of the bundled model
        picture = picture.resize((side, side))
    unit = CLIP | {"size": size, "resize_mode": mode, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    preprocessing = Preprocessing.from_open_clip(unit)
    difference = preprocessing.tensor(to_tensor([picture])) - preprocessing.pictures([picture])
    assert 255 * difference.abs().mean() < 0.5


def test_pictures_of_any_size_become_one_batch():
    sizes = [(300, 200), (200, 300), (224, 224), (50, 40)]
    batch = Preprocessing.from_open_clip(CLIP).pictures([Image.new("RGB", size, "white") for size in sizes])
    white = (1 - torch.tensor(CLIP["mean"])) / torch.tensor(CLIP["std"])
    assert_close(batch, white.view(1, 3, 1, 1).expand(4, 3, 224, 224))


@pytest.mark.parametrize("portrait", [False, True])
def test_crop_is_the_centre(portrait: bool):
    array = np.zeros((224, 448, 3), np.uint8)
    array[:, 112:336] = 255  # the middle half of a 2:1 picture is exactly what is kept
    unit = Preprocessing.from_open_clip(CLIP | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    picture = Image.fromarray(array.transpose(1, 0, 2) if portrait else array)
    assert (unit.pictures([picture]) == 1).all()
    assert (unit.tensor(to_tensor([picture])) == 1).all()


def test_bicubic_overshoot_at_an_edge_is_clipped_as_in_8_bits():
    array = np.zeros((64, 64, 3), np.uint8)
    array[:, 32:] = 255
    unit = Preprocessing.from_open_clip(CLIP | {"mean": (0.0,) * 3, "std": (1.0,) * 3})
    edge = unit.tensor(to_tensor([Image.fromarray(array)]))
    assert (edge.min(), edge.max()) == (0, 1)


def test_gradient_reaches_every_pixel_that_is_not_cropped():
    images = torch.full((1, 3, 100, 100), 0.5, requires_grad=True)
    Preprocessing.from_open_clip(CLIP).tensor(images).sum().backward()
    assert images.grad is not None
    assert (images.grad > 0).all()


@pytest.mark.parametrize("portrait", [False, True])
def test_longest_side_fits_and_the_rest_is_black_below_and_above(portrait: bool):
    array = np.full((101, 448, 3), 255, np.uint8)  # half of it is 50.5, rounded to even: 50 rows
    white = np.zeros((224, 224), bool)
    white[87:137] = True  # 174 black rows, 87 of them above
    unit = Preprocessing.from_open_clip(
        CLIP | {"resize_mode": "longest", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    )
    picture = Image.fromarray(array.transpose(1, 0, 2) if portrait else array)
    expected = torch.from_numpy(white.T if portrait else white).float().expand(3, 224, 224)
    assert_close(unit.pictures([picture])[0], expected)
    assert_close(unit.tensor(to_tensor([picture]))[0], expected)


def test_picture_of_the_right_width_is_padded_too():
    unit = Preprocessing.from_open_clip(
        CLIP | {"resize_mode": "longest", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    )
    picture = Image.new("RGB", (224, 101), "white")
    assert unit.pictures([picture])[0, 0].sum(0).tolist() == [101] * 224
    assert_close(unit.tensor(to_tensor([picture])), unit.pictures([picture]))
    assert unit.tensor(torch.ones(1, 3, 1, 1000)).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "change",
    [
        {"resize_mode": "longest", "fill_color": 255},
        {"resize_mode": "shorter"},
        {"size": (224, 112)},
        {"interpolation": "random"},
    ],
)
def test_unknown_preprocessing_is_refused(change: dict[str, object]):
    with pytest.raises(RewardError, match="not supported"):
        Preprocessing.from_open_clip(CLIP | change)


# --- as transformers writes it ------------------------------------------------------------------------------

PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    "clip, odd": CLIPImageProcessorPil(size={"shortest_edge": 97}, crop_size={"height": 97, "width": 97}),
    "siglip": SiglipImageProcessorPil(),
    "siglip 2": SiglipImageProcessorPil(resample=2, size={"height": 64, "width": 64}),
}


@pytest.mark.parametrize("name", PHOTOGRAPHS)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_pil_path_is_exactly_that_of_transformers(name: str, kind: str):
    processor = PROCESSORS[kind]
    theirs = processor([photograph(name)], return_tensors="pt")["pixel_values"]
    ours = Preprocessing.from_transformers(processor.to_dict()).pictures([photograph(name)])
    assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_configuration_of_2022_is_read_as_todays():
    today = CLIPImageProcessorPil().to_dict()
    old = {key: today[key] for key in ("do_resize", "image_mean", "image_std")} | {
        "size": 224,
        "crop_size": 224,
    }
    assert Preprocessing.from_transformers(old) == Preprocessing.from_transformers(today)


@pytest.mark.parametrize(
    "change",
    [
        {"crop_size": 200},
        {"resample": 1},
        {"do_normalize": False},
        {"do_center_crop": False},
        {"size": {"longest_edge": 224}},
    ],
)
def test_other_steps_of_transformers_are_refused(change: dict[str, object]):
    with pytest.raises(RewardError, match="not supported"):
        Preprocessing.from_transformers(CLIPImageProcessorPil().to_dict() | change)
