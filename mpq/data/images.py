"""Bytes of an image file to pixels of the wanted size and channels."""

from __future__ import annotations

import io
import math
import re
import struct
import zlib
from dataclasses import dataclass

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


FILTERS = {one.name.lower(): one for one in Image.Resampling}
_FIT = re.compile(rf"({'|'.join(FILTERS)}) (1|0\.\d+)( squash)?")


@dataclass(frozen=True, slots=True)
class Fit:
    """How a network wants pictures brought to its size, as timm configures and evaluates it.

    Args:
        interpolation: one of `FILTERS`.
        crop: share of the shorter side that is kept, in (0, 1].
        squash: each side is scaled by itself, whatever becomes of the aspect.
    """

    interpolation: str
    crop: float
    squash: bool = False

    @classmethod
    def parse(cls, text: str) -> Fit:
        """The inverse of `str`.

        Raises:
            DataError: text of another form.
        """
        found = _FIT.fullmatch(text)
        if found is None or not float(found[2]):
            raise DataError(
                f"pictures must be fitted by a filter ({', '.join(FILTERS)}) and the share of the "
                f"shorter side that is kept, as in bicubic 0.875. Got {text!r}."
            )
        return cls(found[1], float(found[2]), bool(found[3]))

    def __str__(self) -> str:
        return f"{self.interpolation} {self.crop:g}{' squash' * self.squash}"

    def __call__(self, image: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The image at `size` (height, width)."""
        have, goal = (image.height, image.width), [math.floor(x / self.crop) for x in size]
        if not self.squash:
            short = max((0, 1), key=lambda k: goal[k] / have[k])
            goal = [max(goal[k], goal[short] * have[k] // have[short]) for k in (0, 1)]
        image = image.resize((goal[1], goal[0]), FILTERS[self.interpolation])
        top, left = (round((g - x) / 2) for g, x in zip(goal, size, strict=True))
        return image.crop((left, top, left + size[1], top + size[0]))


def fit(image: Image.Image, size: tuple[int, int], how: Fit | None = None) -> Image.Image:
    """The image at `size` (height, width): scaled to cover it, then cut around the centre.

    Aspect is kept. Bilinear with antialiasing, if the network does not say `how` itself. An image
    of that size comes back untouched.
    """
    height, width = size
    if image.size == (width, height):
        return image
    if how is not None:
        return how(image, size)
    scale = max(height / image.height, width / image.width)
    large = min(size) >= CENTRE_FROM and scale <= CENTRE
    keep = CENTRE if large else 1.0
    box_w = min(width / scale * keep, image.width)
    box_h = min(height / scale * keep, image.height)
    left, top = (image.width - box_w) / 2, (image.height - box_h) / 2
    right, bottom = min(left + box_w, image.width), min(top + box_h, image.height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=(left, top, right, bottom))


def fit_array(images: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """`fit` for each of `[n, h, w, C]`, giving `[n, H, W, C]`."""
    out = np.empty((len(images), *size, images.shape[-1]), np.uint8)
    for i, image in enumerate(images):
        if images.shape[-1] in (3, 4):
            out[i] = np.asarray(fit(Image.fromarray(image), size))
        else:
            for channel in range(images.shape[-1]):
                out[i, ..., channel] = np.asarray(fit(Image.fromarray(image[..., channel]), size))
    return out


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's name for the pixels of an image, by their channels."""


def is_image(name: str) -> bool:
    """Whether the name is that of an image; hidden files and macOS litter are none."""
    hidden = name.startswith((".", "__MACOSX/")) or "/." in name
    return not hidden and name.lower().endswith(SUFFIXES)


def mode_of(channels: int) -> str:
    """The mode to decode to.

    Raises:
        DataError: files of images do not have so many channels.
    """
    if channels not in MODES:
        raise DataError(
            f"files of images give 1, 3 or 4 channels (grey, RGB, RGBA), but the network takes "
            f"{channels}. Give uint8 arrays [n, H, W, {channels}] in a .npy or .npz file, or from "
            "module:factory."
        )
    return MODES[channels]


def as_channels(images: NDArray[np.uint8], channels: int, *, of: str) -> NDArray[np.uint8]:
    """Images `[n, H, W, C]` with other channels, as `decode` converts grey, RGB and RGBA.

    Raises:
        DataError: neither has as many as images have; `of` names the data.
    """
    own = images.shape[-1]
    if own == channels:
        return images
    if own not in MODES or channels not in MODES:
        raise DataError(
            f"images of {of} have {own} channels, but the network takes {channels}. Give images of "
            "as many, or --input-shape C,H,W."
        )
    if (own, channels) == (1, 3):
        return np.repeat(images, 3, axis=-1)
    planes = images[..., 0] if own == 1 else images
    made = [np.asarray(Image.fromarray(x).convert(MODES[channels])) for x in planes]
    return np.stack(made).reshape(*images.shape[:3], channels)


def decode(
    data: bytes, size: tuple[int, int], *, where: str, channels: int = 3, how: Fit | None = None
) -> NDArray[np.uint8]:
    """Pixels `[H, W, C]` of an encoded image; `where` names it in the error.

    Raises:
        DataError: the bytes are no complete image, or images have no such channels.
    """
    found = np.asarray(fit(open_image(data, channels, where=where), size, how))
    return found.reshape(*found.shape[:2], channels)


def open_image(data: bytes, channels: int, *, where: str) -> Image.Image:
    """An encoded image in its own size, with these channels. Raises as `decode`."""
    mode = mode_of(channels)
    try:
        with Image.open(io.BytesIO(data)) as image:
            _check_pixels(image, where)
            return _eight_bits(image).convert(mode)
    except _BROKEN as error:
        raise DataError(_broken(where, data, error)) from error


def _eight_bits(image: Image.Image) -> Image.Image:
    """Of 16-bit grey the upper half, where Pillow would turn all above 255 white."""
    if not image.mode.startswith("I;16"):
        return image
    return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))


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
