"""The embedded data set: 1797 handwritten digits of 8x8 pixels that ship with scikit-learn."""

from __future__ import annotations

from functools import cache

import numpy as np

from mpq.data.dataset import ArraySplit
from mpq.data.images import as_channels, fit_array
from mpq.data.splits import Splits

SIZE = (16, 16)


def open_digits(size: tuple[int, int] | None, channels: int = 3) -> Splits:
    """All digits as one split of images, bilinearly resized to `size` (16x16)."""
    return _digits(size or SIZE, channels)


@cache
def _digits(size: tuple[int, int], channels: int) -> Splits:
    # Importing scikit-learn takes about a second, which other data need not wait for.
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    images = fit_array(as_channels(grey[..., None], channels, of="digits"), size)
    split = ArraySplit(images, digits.target.astype(np.int64), size)
    return Splits(tuple(map(str, digits.target_names)), split, None, None, size)
