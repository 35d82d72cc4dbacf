"""Pictures out of a request: base64 of a PNG, whose size is checked before it is decoded."""

from __future__ import annotations

import base64
import struct

from PIL import Image

from diffalign.errors import DataError
from diffalign.images import open_image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_IHDR = slice(12, 16)
_SIZE = slice(16, 24)


def decode_png(text: str, max_pixels: int) -> Image.Image:
    """An RGB picture.

    Raises:
        DataError: not base64, not a PNG, damaged, or more than `max_pixels` (said from the header).
    """
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise DataError("the picture is not base64") from error
    if not data.startswith(_SIGNATURE) or data[_IHDR] != b"IHDR" or len(data) < _SIZE.stop:
        raise DataError("the picture is not a PNG")
    width, height = struct.unpack(">II", data[_SIZE])
    if width * height > max_pixels:
        raise DataError(
            "the picture is too large", why=f"{width} x {height} pixels; the limit is {max_pixels} in all"
        )
    picture = open_image(data, "the picture")
    if picture.width * picture.height > max_pixels:  # a second header, after the one above
        raise DataError("the picture is larger than its header says")
    return picture
