from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.testing import assert_close

from diffalign.errors import DataError, NumericsError
from diffalign.images import open_image, resize_crop, to_pil, to_tensor, to_uint8


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Smooth, different in every channel, and with no symmetry."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = np.stack([x * 255, y * 255, (x * y) * 200 + 20], axis=-1)
    return Image.fromarray(channels.round().astype(np.uint8))


def test_uint8_conversion_rounds_and_clamps():
    # 0.5 * 255 = 127.5 rounds to even 128; 0.499 * 255 = 127.245; 2.6 / 255 rounds up, truncation gives 2
    values = torch.tensor([-0.2, 0.0, 2.6 / 255, 0.499, 0.5, 1.0, 1.7])
    assert to_uint8(values).tolist() == [0, 0, 3, 127, 128, 255, 255]
    assert to_uint8(values).dtype == torch.uint8


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_picture_that_is_not_finite_is_refused_and_named(bad: float):
    images = torch.zeros(3, 3, 2, 2)
    images[1, 2, 0, 1] = bad
    with pytest.raises(NumericsError, match=r"element \(1, 2, 0, 1\)"):
        to_pil(images)


def test_all_8_bit_values_survive_the_round_trip_in_their_place():
    values = torch.arange(2 * 3 * 8 * 16).remainder(256).reshape(2, 3, 8, 16)
    images = to_pil(values / 255)
    assert [image.size for image in images] == [(16, 8), (16, 8)]
    assert images[1].getpixel((5, 2)) == tuple(values[1, :, 2, 5].tolist())
    assert torch.equal(to_tensor(images), values / 255)


def test_to_pil_wants_a_batch_of_three_channels():
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[3, 4, 4\]"):
        to_pil(torch.zeros(3, 4, 4))


def test_pictures_of_different_sizes_do_not_make_a_batch():
    with pytest.raises(DataError, match=r"2 different sizes[^$]*4x4, 8x4"):
        to_tensor([Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))])


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (2, 1))
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying: turn a quarter clockwise to show it
    upright = open_image(encode(image, exif=exif), "x")
    assert upright.size == (1, 2)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_shown_as_pillow_shows_it(format: str, orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(photo(5, 3), format, exif=exif, **options)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert_close(to_tensor([open_image(data, "x")]), to_tensor([expected]), atol=0, rtol=0)
    assert expected.size == ((5, 3) if orientation < 5 else (3, 5))


@pytest.mark.parametrize("exif", [b"Exif\0\0garbagegarbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_exif_block_leaves_the_picture_as_it_is(format: str, exif: bytes):
    assert open_image(encode(photo(8, 4), format, exif=exif), "x").size == (8, 4)


def test_16_bit_greyscale_is_scaled_not_clipped():
    grey = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    for data in (encode(Image.fromarray(grey)), encode(Image.fromarray(grey), "TIFF")):
        image = open_image(data, "x")
        assert [image.getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (100, 100, 100), (255, 255, 255)]


def test_transparency_is_laid_over_white():
    image = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((0, 0), (10, 20, 30, 0))
    read = open_image(encode(image), "x")
    assert [read.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (10, 20, 30)]


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_entry_of_a_palette_is_white(format: str):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((1, 0), 1)
    read = open_image(encode(image, format, transparency=0), "x")
    assert [read.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (40, 50, 60)]


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "PNG"), ("1", "PNG"), ("P", "PNG"), ("LA", "PNG"), ("CMYK", "TIFF"), ("CMYK", "JPEG")],
)
def test_other_modes_become_rgb(mode: str, format: str):
    image = open_image(encode(Image.new("RGB", (4, 4), "white").convert(mode), format), "x")
    assert image.mode == "RGB"
    assert image.getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(format: str):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(data, "x").getpixel((0, 0)) == (255, 0, 0)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has hardly any pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 10))


@pytest.mark.parametrize("side", [8_001, 10_000, 60_000])  # ours; Pillow warns at 89, refuses at 178 Mpixel
def test_a_pixel_bomb_is_refused_from_its_header(side: int):
    with pytest.raises(DataError, match=r"picture too large[^$]*bomb\.png"):
        open_image(png_header(side, side), "bomb.png")


BOMBS = {
    "BMP": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6),
    "GIF": b"GIF89a"
    + struct.pack("<HH", 30_000, 30_000)
    + b"\0\0\0,"
    + struct.pack("<HHHHB", 0, 0, 30_000, 30_000, 0)
    + b"\2\0;",
    "PPM": b"P6 30000 30000 255\n" + b"\0" * 99,
    "PNG": png_header(30_000, 30_000),
}


@pytest.mark.parametrize("format", BOMBS)
def test_a_bomb_of_any_format_is_refused_from_its_header(format: str):
    with pytest.raises(
        DataError, match=r"picture too large[^$]*more pixels than Pillow opens; at most 64 million"
    ):
        open_image(BOMBS[format], "bomb")


def test_an_empty_file_and_one_that_is_no_picture_are_told_apart(tmp_path: Path):
    (tmp_path / "empty.png").write_bytes(b"")
    for source in (b"", tmp_path / "empty.png"):
        with pytest.raises(DataError, match="it is empty"):
            open_image(source, "x")
    with pytest.raises(DataError, match="not a picture, or damaged in its header"):
        open_image(b"text", "x")


def test_unreadable_pictures_are_data_errors_that_name_them(tmp_path: Path):
    whole = encode(photo(64, 64))
    text = tmp_path / "a.png"
    text.write_text("not a picture")
    other_format = encode(photo(64, 64), "PCX")
    for source in (text, b"", whole[: len(whole) // 2], other_format):
        with pytest.raises(DataError, match=r"unreadable picture[^$]*row 7"):
            open_image(source, "row 7")
    with pytest.raises(DataError, match=r"picture not found[^$]*row 7"):
        open_image(tmp_path / "gone.png", "row 7")


@pytest.mark.parametrize(("width", "height"), [(100, 60), (60, 100), (20, 31)])
def test_resize_crop_equals_shortest_side_then_centre(width: int, height: int):
    image = photo(width, height)
    scale = 32 / min(width, height)
    size = (round(width * scale), round(height * scale))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    expected = to_tensor([resized.crop((left, top, left + 32, top + 32))])
    # half a pixel of cropping on a ramp of 1 / 32 a pixel, and less than that at the borders
    assert_close(to_tensor([resize_crop(image, 32)]), expected, atol=0.5 / 32 + 0.01, rtol=0)


def test_resize_crop_of_a_tensor_and_of_an_image_agree():
    image = photo(70, 50)
    from_tensor = resize_crop(to_tensor([image]), 24)
    assert_close(from_tensor, to_tensor([resize_crop(image, 24)]), atol=1.5 / 255, rtol=0)


def test_shrinking_is_antialiased():
    # 72 to 8: plain interpolation would look at every ninth pixel only, and find black or white
    checkerboard = (torch.arange(72).reshape(72, 1) + torch.arange(72)).remainder(2).float()
    images = checkerboard.expand(1, 3, 72, 72)
    grey = torch.full((1, 3, 8, 8), 0.5)
    assert_close(resize_crop(images, 8), grey, atol=0.05, rtol=0)
    assert_close(to_tensor([resize_crop(to_pil(images)[0], 8)]), grey, atol=0.05, rtol=0)


def test_resize_crop_lets_gradients_through():
    images = torch.full((1, 3, 8, 6), 0.5, requires_grad=True)
    resize_crop(images, 3).sum().backward()
    assert images.grad is not None
    assert images.grad[..., 0, :].abs().max() == 0  # cropped away
    assert images.grad[..., 1:7, :].abs().min() > 0
