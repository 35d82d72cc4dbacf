"""Pictures in and out: the one place where files, PIL images and tensors are converted.

Everywhere else a picture is a float32 tensor NCHW in [0, 1], or an RGB PIL image. Conversion to 8 bits
rounds and clamps; a tensor that is not finite is refused instead of becoming a black picture.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffalign.config.sizes import Resolution, Size, as_size
from diffalign.errors import DataError, NumericsError

MAX_PIXELS = 64 * 10**6
"""Pictures with more pixels are refused from their header, before any of them is decoded."""

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
"""What `open_image` reads. Formats that start other programs (EPS) stay out."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> how the stored pixels are turned to be shown."""
_LIES_ON_ITS_SIDE = 5
"""The orientation from which on height and width are exchanged."""
T = TypeVar("T")


def to_uint8(images: Tensor) -> Tensor:
    """Floats in [0, 1] to uint8 in [0, 255], rounded and clamped; shape and device are kept.

    Raises:
        NumericsError: a value is NaN or infinite.
    """
    images = images.detach().float()
    finite = torch.isfinite(images)
    if not finite.all():
        first = tuple(torch.nonzero(~finite)[0].tolist())
        raise NumericsError(
            "picture with NaN or infinite pixels",
            where=f"element {first} of a tensor of shape {tuple(images.shape)}",
            hint="half-precision VAEs overflow on some pictures; decode with model.vae_dtype: float32",
        )
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(images: Tensor) -> list[Image.Image]:
    """[N, 3, H, W] floats in [0, 1] to N RGB images."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"expected pictures of shape [N, 3, H, W], got {list(images.shape)}")
    return [Image.fromarray(array) for array in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """N images of one size to float32 [N, 3, H, W] in [0, 1] on the CPU.

    Raises:
        DataError: the images differ in size.
    """
    if not images:
        raise ValueError("no images to convert")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        listed = ", ".join(f"{width}x{height}" for width, height in sizes[:4])
        raise DataError(
            f"pictures of {len(sizes)} different sizes in one batch",
            why=f"sizes (width x height): {listed}",
            hint="resize them to one size first (diffalign.images.resize_crop)",
        )
    arrays = np.stack([np.array(_to_rgb(image)) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float().div(255)


def open_image(source: Path | bytes, where: str) -> Image.Image:
    """Read a picture as 8-bit RGB, upright.

    EXIF orientation is applied (a damaged EXIF block says nothing), 16-bit greyscale is scaled, CMYK and
    palettes are converted, transparency is laid over white, and of an animation the first frame is taken.

    Args:
        source: a file, or the bytes of one.
        where: file or row, for the error message.

    Raises:
        DataError: missing, damaged, of an unsupported format, or above `MAX_PIXELS`.
    """
    return _read(source, where, lambda image: _to_rgb(_upright(image)))


def picture_size(source: Path | bytes, where: str) -> Size:
    """Height and width of a picture as `open_image` shows it, from its header: no pixel is decoded.

    Arguments and errors are those of `open_image`; damage behind the header is not seen.
    """
    return _read(source, where, _upright_size)


def _read(source: Path | bytes, where: str, use: Callable[[Image.Image], T]) -> T:
    size = "more pixels than Pillow opens"
    try:
        with _no_warnings(), Image.open(_stream(source), formats=FORMATS) as image:
            size = f"{image.width} x {image.height} pixels"
            if image.width * image.height <= MAX_PIXELS:
                return use(image)
    except FileNotFoundError as error:
        raise DataError("picture not found", where=where) from error
    except Image.DecompressionBombError:
        pass
    except UnidentifiedImageError as error:
        raise DataError(
            "unreadable picture",
            where=where,
            why="it is empty" if _is_empty(source) else "not a picture, or damaged in its header",
            hint=f"supported formats: {', '.join(FORMATS)}",
        ) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise DataError(
            "unreadable picture",
            where=where,
            why=str(error) or type(error).__name__,
            hint=f"supported formats: {', '.join(FORMATS)}",
        ) from error
    raise DataError(
        "picture too large",
        where=where,
        why=f"{size}; at most {MAX_PIXELS // 10**6} million are decoded",
        hint="resize it, or leave it out",
    )


@overload
def resize_crop(images: Image.Image, resolution: Resolution) -> Image.Image: ...
@overload
def resize_crop(images: Tensor, resolution: Resolution) -> Tensor: ...
def resize_crop(images: Image.Image | Tensor, resolution: Resolution) -> Image.Image | Tensor:
    """The largest centred square, or rectangle of the shape asked for, resized (antialiased bicubic, up or down).

    Resizing to cover the size and cropping the centre gives the same picture but for the outermost pixels,
    and takes memory for the long side.

    Args:
        images: one PIL image, or floats [N, C, H, W] in [0, 1] (differentiable).
        resolution: the side of a square, or height and width.
    """
    height, width = size = as_size(resolution)
    if isinstance(images, Image.Image):
        top, left, rows, columns = _centred((images.height, images.width), size)
        box = (left, top, left + columns, top + rows)
        return images.crop(box).resize((width, height), Image.Resampling.BICUBIC)
    top, left, rows, columns = _centred((images.shape[-2], images.shape[-1]), size)
    kept = images[..., top : top + rows, left : left + columns]
    return F.interpolate(kept, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)


def _centred(whole: Size, shape: Size) -> tuple[int, int, int, int]:
    """Top, left, height and width of the largest centred part of `whole` that is as wide for its height as `shape`."""
    rows = max(1, min(whole[0], round(whole[1] * shape[0] / shape[1])))
    columns = max(1, min(whole[1], round(whole[0] * shape[1] / shape[0])))
    return (whole[0] - rows) // 2, (whole[1] - columns) // 2, rows, columns


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Pillow warns of large pictures, where our limit is lower, and of damaged EXIF, which says nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.simplefilter("ignore", UserWarning)
        yield


def _stream(source: Path | bytes) -> Path | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _is_empty(source: Path | bytes) -> bool:
    return not source if isinstance(source, bytes) else source.stat().st_size == 0


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a parser of damaged bytes, like the decoders
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _upright_size(image: Image.Image) -> Size:
    try:
        # The base class's: PNG's own decodes the whole picture in search of an EXIF block behind the pixels.
        turned = Image.Image.getexif(image).get(_ORIENTATION, 1) >= _LIES_ON_ITS_SIDE
    except Exception:  # a parser of damaged bytes, like the decoders
        turned = False
    return (image.width, image.height) if turned else (image.height, image.width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
    values = np.asarray(image, dtype=np.float32)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixel values beyond 16 bits")
    return Image.fromarray(np.rint(values / 257).astype(np.uint8)).convert("RGB")
