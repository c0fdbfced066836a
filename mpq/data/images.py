"""Bytes of an image file to RGB pixels of the wanted size."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpq.errors import DataError
from mpq.limits import current, exceeded

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
CENTRE = 0.875
"""Share of the shorter side that is kept of a large photograph: 224 of 256 pixels, the way the
published accuracies of ImageNet networks are measured."""
CENTRE_FROM = 128
"""Smaller inputs (CIFAR, digits) keep the whole image: their borders carry content."""

_BROKEN = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def fit(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The image at `size` (height, width): scaled to cover it, then cut around the centre.

    Aspect is kept. Bilinear with antialiasing. An image of that size comes back untouched.
    """
    height, width = size
    if image.size == (width, height):
        return image
    scale = max(height / image.height, width / image.width)
    large = min(size) >= CENTRE_FROM and scale <= CENTRE
    keep = CENTRE if large else 1.0
    box_w = min(width / scale * keep, image.width)
    box_h = min(height / scale * keep, image.height)
    left, top = (image.width - box_w) / 2, (image.height - box_h) / 2
    right, bottom = min(left + box_w, image.width), min(top + box_h, image.height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))


def fit_array(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`fit` for each of `[n, h, w, 3]`, giving `[n, H, W, 3]`."""
    out = np.empty((len(images), *size, 3), np.uint8)
    for i, image in enumerate(images):
        out[i] = np.asarray(fit(Image.fromarray(image), size))
    return out


def decode(data: bytes, size: tuple[int, int], *, where: str) -> NDArray[np.uint8]:
    """Pixels `[H, W, 3]` of an encoded image; `where` names it in the error.

    Raises:
        DataError: the bytes are no complete image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(image, where)
            return np.asarray(fit(image.convert("RGB"), size))
    except _BROKEN as error:
        raise DataError(_broken(where, data, error)) from error


def _check_pixels(image: Image.Image, where: str) -> None:
    """Refuse by its header an image that would fill memory when it is decoded."""
    found = image.width * image.height / 1e6
    if found > current().megapixels:
        got = f"{image.width} x {image.height} pixels"
        raise DataError(exceeded(where, "megapixels", got))


def probe_size(data: bytes, *, where: str) -> tuple[int, int]:
    """Height and width from an image's header.

    Raises:
        DataError: the bytes do not begin like an image.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.height, image.width
    except _BROKEN as error:
        raise DataError(_broken(where, data, error)) from error


def _broken(where: str, data: bytes, error: Exception) -> str:
    reason = str(error).split(" <_io")[0] or type(error).__name__
    return (
        f"{where} must be a complete image ({', '.join(SUFFIXES)}). Got {len(data)} bytes that "
        f"cannot be decoded: {reason}. Replace or remove that file."
    )
