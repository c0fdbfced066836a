"""`Normalization`: what lies between stored bytes and a network's input, with a text form.

`x = (rgb / 255 - mean) / std`. The text form is a name or `m,m,m/s,s,s`; `parse` and `str` are
inverses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.errors import DataError, nearest


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation, in units of `rgb / 255`.

    Args:
        mean: of red, green, blue.
        std: of red, green, blue; above 0.

    Raises:
        DataError: not three finite numbers each, or a std that is not above 0.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.mean) != 3 or len(self.std) != 3:
            raise DataError(
                "normalization must have 3 means and 3 standard deviations (RGB). "
                f"Got {len(self.mean)} and {len(self.std)}."
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

    def apply(self, images: NDArray[np.uint8 | np.float32]) -> NDArray[np.float32]:
        """Network input `[n, C, H, W]` float32 of RGB images `[n, H, W, 3]` uint8.

        Images of floats `[n, H, W, C]` are what the network takes already: only their axes move.

        Raises:
            DataError: images of another shape or type.
        """
        if images.ndim == 4 and images.dtype == np.float32:
            return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"images must be uint8 [n, H, W, 3]. Got {images.dtype} {list(images.shape)}."
            )
        planes = images.transpose(0, 3, 1, 2)
        out = np.empty(planes.shape, np.float32)
        np.divide(planes, np.float32(255), out=out)
        out -= np.array(self.mean, np.float32)[:, None, None]
        out /= np.array(self.std, np.float32)[:, None, None]
        return out


NAMED = {
    "imagenet": Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "none": Normalization((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "raw": Normalization((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255)),
}
"""Known normalizations; `none` is 0..1, `raw` is 0..255."""
