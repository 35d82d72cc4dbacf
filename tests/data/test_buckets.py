"""Which size each item goes to, and the order in which buckets give their batches."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from diffalign.config import ImagesConfig, LabelledConfig, PairsConfig
from diffalign.data.buckets import Buckets, bucket_sizes, nearest, sizes_like, told
from diffalign.data.images import CaptionedImages
from diffalign.data.labelled import LabelledImages
from diffalign.data.order import Order, batch_indices, first_seen
from diffalign.data.preferences import PreferencePairs
from diffalign.errors import DataError
from diffalign.images import open_image, picture_size, resize_crop

TALL, SQUARE, WIDE = (24, 16), (16, 16), (16, 24)


# --- sizes --------------------------------------------------------------------------------------------------


def test_generated_sizes_have_about_the_area_asked_for():
    found = sizes_like(512)
    # height 320: 512^2 / 320 = 819.2, in steps of 64 down to 768; 832 x 320 would be more than the area
    assert {(512, 512), (320, 768), (768, 320), (448, 576), (256, 1024)} <= set(found)
    assert found[0] == (512, 512)
    assert all(height % 64 == width % 64 == 0 and height * width <= 512**2 for height, width in found)
    assert all(256 <= side <= 1024 for size in found for side in size)
    assert {(width, height) for height, width in found} == set(found)
    assert len(found) == len(set(found))


def test_steps_are_smaller_where_pictures_are():
    # an eighth of 300 is 37: steps of 32
    assert all(side % 32 == 0 for size in sizes_like(300)[1:] for side in size)
    assert (16, 16) in sizes_like(16)
    assert (14, 18) in sizes_like(16)  # steps of 2: 256 / 14 = 18.3


def test_a_resolution_that_is_no_square_is_a_bucket_itself():
    assert bucket_sizes("auto", (520, 776))[0] == (520, 776)
    assert bucket_sizes([TALL], None) == [TALL]
    assert bucket_sizes(None, 512) is None


@pytest.mark.parametrize(
    ("picture", "size"),
    [
        ((100, 100), SQUARE),
        (
            (100, 80),
            SQUARE,
        ),  # log 1.25 = 0.22 from the square, log 1.5 / 1.25 = 0.18 from the tall one: see below
        ((100, 70), TALL),
        ((70, 100), WIDE),
        ((10, 1000), WIDE),
    ],
)
def test_a_picture_goes_to_the_nearest_shape(picture, size):
    # the border between 1 and 1.5 is at sqrt(1.5) = 1.2247: 100 / 80 = 1.25 lies beyond, 100 / 82 = 1.2195 before it
    if picture == (100, 80):
        assert nearest(picture, [SQUARE, TALL, WIDE]) == 1
        picture = (100, 82)
    sizes = [SQUARE, TALL, WIDE]
    assert sizes[nearest(picture, sizes)] == size


def test_among_sizes_of_one_shape_no_picture_is_enlarged_without_need():
    sizes = [(32, 32), (16, 16), (64, 64)]
    found = [sizes[nearest((side, side), sizes)] for side in (100, 64, 63, 20, 8)]
    assert found == [(64, 64), (64, 64), (32, 32), (16, 16), (16, 16)]


def test_what_a_network_is_told_of_a_crop():
    # 100 x 50 to cover 16 x 24: the width decides, 24 / 50 = 0.48; 48 x 24, of which (48 - 16) / 2 = 16 rows go above
    assert told((100, 50), WIDE) == (100, 50, 16, 0, 16, 24)
    assert told((16, 16), SQUARE) == (16, 16, 0, 0, 16, 16)
    # 30 x 100 to cover 16 x 16: 16 / 30 gives 16 x 53, and (53 - 16) // 2 = 18
    assert told((30, 100), SQUARE) == (30, 100, 0, 18, 16, 16)


# --- pictures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [TALL, WIDE, (8, 40)])
def test_the_crop_is_centred_and_has_the_shape_asked_for(size):
    """A picture whose red is its row and whose green is its column, both from 0 to 1."""
    rows, columns = torch.linspace(0, 1, 60), torch.linspace(0, 1, 90)
    picture = torch.stack([rows[:, None].expand(60, 90), columns.expand(60, 90), torch.zeros(60, 90)])[None]
    cropped = resize_crop(picture, size)
    assert cropped.shape == (1, 3, *size)
    assert_close(cropped.mean((0, 2, 3))[:2], torch.tensor([0.5, 0.5]), atol=0.01, rtol=0)
    # as much of it as fits: the whole height where 60 / 90 is lower than the shape, else the whole width
    spans = cropped[0, :2].amax((1, 2)) - cropped[0, :2].amin((1, 2))
    shape = size[0] / size[1]
    expected = [min(1.0, shape * 90 / 60), min(1.0, 60 / (shape * 90))]
    assert_close(spans, torch.tensor(expected), atol=0.06, rtol=0)
    as_pil = Image.new("RGB", (90, 60))
    assert resize_crop(as_pil, size).size == (size[1], size[0])


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_size_read_from_the_header_is_that_of_the_upright_picture(format):
    for orientation in (1, 3, 6, 8):
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.new("RGB", (30, 20)).save(buffer, format, exif=exif)
        opened = open_image(buffer.getvalue(), "here")
        assert picture_size(buffer.getvalue(), "here") == (opened.height, opened.width)


def test_a_header_is_enough():
    buffer = io.BytesIO()
    Image.effect_noise((64, 48), 50).save(buffer, "PNG")
    assert picture_size(buffer.getvalue()[:200], "here") == (48, 64)
    with pytest.raises(DataError, match="unreadable"):
        picture_size(b"no picture", "here")


# --- items --------------------------------------------------------------------------------------------------


def buckets_of(pictures: list[tuple[int, int] | None]) -> Buckets:
    def read(index):
        if pictures[index] is None:
            raise DataError("unreadable picture", where=f"{index}.png")
        return [pictures[index]]

    return Buckets([SQUARE, TALL, WIDE], len(pictures), read)


def test_buckets_hold_their_items_and_say_how_many():
    buckets = buckets_of([(20, 20), (30, 20), (60, 40), (21, 20), (8, 8)])
    assert buckets.groups == [[0, 3, 4], [1, 2]]
    assert buckets.sizes == [SQUARE, TALL]
    assert [buckets.size(index) for index in range(5)] == [SQUARE, TALL, TALL, SQUARE, SQUARE]
    assert buckets.describe() == "2 sizes (height x width): 3 at 16 x 16, 2 at 24 x 16"
    assert buckets.warning(2) is None
    assert "1 of 2 buckets hold less than a batch (3): 24 x 16" in buckets.warning(3)
    assert buckets.told(1).tolist() == [[30, 20, 0, 0, 24, 16]]


def test_an_item_without_a_readable_header_goes_to_the_fullest_bucket():
    buckets = buckets_of([(20, 20), None, (60, 40), (30, 20)])
    assert buckets.groups == [[0], [1, 2, 3]]
    assert list(buckets.mates(1)) == [1, 2, 3]
    with pytest.raises(DataError, match="unreadable picture"):
        buckets_of([None, None])


def write_pictures(folder: Path, sizes: list[tuple[int, int]]) -> list[str]:
    names = []
    for i, (height, width) in enumerate(sizes):
        Image.new("RGB", (width, height), (20 * i, 100, 50)).save(folder / f"{i}.png")
        names.append(f"{i}.png")
    return names


def test_a_pair_is_one_item_of_the_shape_of_its_preferred_picture(tmp_path):
    names = write_pictures(tmp_path, [(30, 20), (20, 30), (20, 20), (30, 20)])
    rows = [
        {"prompt": "a", "jpg_0": names[0], "jpg_1": names[1], "label_0": 1},
        {"prompt": "b", "jpg_0": names[0], "jpg_1": names[1], "label_0": 0},
        {"prompt": "c", "jpg_0": names[2], "jpg_1": names[3], "label_0": 1},
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    config = PairsConfig(path=str(file), validation_fraction=0)
    pairs = PreferencePairs(config, "drop", [SQUARE, TALL, WIDE])
    train = pairs.train
    assert [train.buckets.size(index) for index in range(3)] == [TALL, WIDE, SQUARE]
    for index in range(3):
        size = train.buckets.size(index)
        assert [picture.shape[1:] for picture in train.load(index, size)] == [size, size]
    # of the second pair, 20 x 30 is preferred; 30 x 20 is enlarged to cover 16 x 24: 36 x 24, (36 - 16) / 2 = 10
    assert train.buckets.told(1).tolist() == [[20, 30, 0, 0, 16, 24], [30, 20, 10, 0, 16, 24]]
    assert pairs.describe().startswith("3 judged pairs of 3 sizes")
    assert len(pairs.validation.buckets.groups) == 0


def test_captioned_and_labelled_pictures_are_sorted_too(tmp_path):
    names = write_pictures(tmp_path, [(30, 20), (20, 20), (60, 40)])
    lines = [{"file_name": name, "text": name, "label": name == "0.png"} for name in names]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes = [SQUARE, TALL]
    captioned = CaptionedImages(ImagesConfig(path=str(tmp_path)), sizes)
    labelled = LabelledImages(LabelledConfig(path=str(tmp_path)), sizes)
    for images in (captioned, labelled):
        assert images.buckets.groups == [[1], [0, 2]]
        assert images.describe().endswith(" of 2 sizes (height x width): 2 at 24 x 16, 1 at 16 x 16")
    assert CaptionedImages(ImagesConfig(path=str(tmp_path))).buckets is None


# --- order --------------------------------------------------------------------------------------------------

GROUPS = [list(range(7)), list(range(7, 10)), list(range(10, 22))]  # 7, 3 and 12 items


def walk(order: Order, steps: int, world: int = 1) -> list[list[int]]:
    return [order.indices(step, rank, world) for step in range(steps) for rank in range(world)]


def test_a_batch_is_of_one_group_and_every_item_comes_once_an_epoch():
    order = Order(GROUPS, batch=4, seed=3)
    # epoch 0: ceil(7 / 4) + ceil(3 / 4) + 12 / 4 = 2 + 1 + 3 batches
    first = walk(order, 6)
    for batch in first:
        assert any(set(batch) <= set(group) for group in GROUPS)
    # what fills the last batches up: one item of the group of 7, one of the group of 3
    seen = [item for batch in first for item in batch]
    assert set(seen) == set(range(22))
    assert len(seen) == 24
    # after 4 epochs (28, 12 and 48 places, all whole batches: 7 + 3 + 12) each item came four times
    seen = [item for batch in walk(order, 22) for item in batch]
    assert [seen.count(item) for item in range(22)] == [4] * 22


def test_the_batches_do_not_depend_on_the_number_of_processes():
    order = Order(GROUPS, batch=4, seed=3)
    alone = walk(order, 24)
    assert walk(order, 12, world=2) == alone
    assert walk(order, 8, world=3) == alone


def test_a_step_does_not_depend_on_what_was_asked_before():
    alone = Order(GROUPS, batch=4, seed=3).indices(17, 0, 1)
    order = Order(GROUPS, batch=4, seed=3)
    walk(order, 30)
    torch.manual_seed(5)
    assert order.indices(17, 0, 1) == alone


def test_groups_take_turns_and_the_seed_decides():
    def groups_of(seed: int) -> list[int]:
        return [
            [batch[0] in group for group in GROUPS].index(True) for batch in walk(Order(GROUPS, 2, seed), 30)
        ]

    assert groups_of(0) != groups_of(1)
    assert groups_of(0) != sorted(groups_of(0))


def test_with_one_group_the_order_is_that_without_buckets():
    order = Order([range(7)], batch=3, seed=5)
    for world in (1, 2):
        for step in range(9):
            assert order.first_seen(step, world) == first_seen(7, 3 * world, step)
            for rank in range(world):
                assert order.indices(step, rank, world) == batch_indices(7, 3, step, 5, rank, world)


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (4, 1), (4, 2), (30, 1)])
def test_first_seen_counts_the_items_that_no_earlier_step_drew(batch, world):
    order, seen = Order(GROUPS, batch, seed=1), set()
    for step in range(12):
        drawn = {item for rank in range(world) for item in order.indices(step, rank, world)}
        assert order.first_seen(step, world) == len(drawn - seen)
        seen |= drawn
        assert order.seen((step + 1) * world) == len(seen)


def test_a_group_smaller_than_a_batch_comes_as_often_as_the_others():
    # 2 and 6 items, batches of 4: after two epochs 4 and 12 places, 1 + 3 batches
    order = Order([[0, 1], list(range(2, 8))], batch=4, seed=0)
    seen = [item for batch in walk(order, 4) for item in batch]
    assert [seen.count(item) for item in range(8)] == [2] * 8
