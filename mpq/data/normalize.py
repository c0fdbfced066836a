"""`Normalization`: what lies between stored bytes and a network's input, with a text form.

`x = (pixel / 255 - mean) / std`. The text form is a name or `m,m,m/s,s,s`, a mean and a deviation
for each channel or one for all; `parse` and `str` are inverses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation, in units of `pixel / 255`.

    Where all channels have the same, images may have any number of them.

    Args:
        mean: of red, green, blue, or of whatever channels there are.
        std: of the same; above 0.

    Raises:
        DataError: not as many finite numbers each, or a std that is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise DataError(
                "normalization must have as many means as standard deviations: 3 means and 3 "
                f"standard deviations for RGB. Got {len(self.mean)} and {len(self.std)}."
            )
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise DataError(
                "normalization must have finite means and standard deviations above 0. "
                f"Got mean {self.mean}, std {self.std}."
            )

    @classmethod
    def parse(cls, text: str) -> Normalization:
        """Read a name or `m,m,m/s,s,s`.

        Raises:
            DataError: text of another form.
        """
        text = text.strip()
        if text.lower() in NAMED:
            return NAMED[text.lower()]
        try:
            mean, std = (tuple(map(float, part.split(","))) for part in text.split("/"))
        except ValueError:
            raise DataError(
                f"normalization must be {', '.join(NAMED)}, or mean/std as m,m,m/s,s,s. "
                f"Got {text!r}{nearest(text, NAMED)}"
            ) from None
        return cls(mean, std)

    def __str__(self) -> str:
        for name, known in NAMED.items():
            if known == self:
                return name
        return "/".join(",".join(map(repr, map(float, part))) for part in (self.mean, self.std))

    def fits(self, channels: int) -> bool:
        """Whether it holds for images of so many channels."""
        return len(self.mean) == channels or len({*zip(self.mean, self.std, strict=True)}) == 1

    def of(self, channels: int) -> Normalization:
        """The same with a mean and a deviation for each of so many channels.

        Raises:
            DataError: it is one of other channels.
        """
        if not self.fits(channels):
            each = f"{','.join(['m'] * channels)}/{','.join(['s'] * channels)}, "
            raise DataError(
                f"normalization {self} is for images of {len(self.mean)} channels, but these have "
                f"{channels}. Give --normalize a mean and a deviation for each, or one for all: "
                f"{each if channels <= MOST_SHOWN else ''}m/s, none or raw. Images are "
                "[n, H, W, C]."
            )
        if len(self.mean) == channels:
            return self
        return Normalization(self.mean[:1] * channels, self.std[:1] * channels)

    def apply(self, images: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]:
        """Network input `[n, C, H, W]` float32 of images `[n, H, W, C]` uint8.

        Images of floats `[n, H, W, C]` are what the network takes already: only their axes move.

        Raises:
            DataError: images of another shape, type or number of channels.
        """
        if images.ndim == 4 and images.dtype == np.float32:
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
        if images.ndim != 4 or images.dtype != np.uint8:
            raise DataError(
                f"images must be uint8 [n, H, W, C]. Got {images.dtype} {list(images.shape)}."
            )
        each = self.of(images.shape[-1])
        planes = images.transpose(0, 3, 1, 2)
        out = np.empty(planes.shape, np.float32)
        np.divide(planes, np.float32(255), out=out)
        out -= np.array(each.mean, np.float32)[:, None, None]
        out /= np.array(each.std, np.float32)[:, None, None]
        return out


MOST_SHOWN = 8
"""Channels up to which a message spells a normalization out."""
NAMED = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "none": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "raw": Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
"""Known normalizations; `none` is 0..1, `raw` is 0..255."""
