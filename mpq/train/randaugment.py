"""RandAugment for a batch: some operations in a row for each image, all of one magnitude.

Source: Cubuk et al., RandAugment: Practical Automated Data Augmentation with a Reduced Search
Space, CVPR Workshops 2020, with the ranges as torchvision defines them. The operations are those of
TrivialAugment, each over a part of its range there.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mpq.train.trivial import BINS, OPERATIONS, apply_chosen

SHARES = {
    "shear_x": 0.3 / 0.99,
    "shear_y": 0.3 / 0.99,
    "rotate": 30 / 135,
    "brightness": 0.9 / 0.99,
    "color": 0.9 / 0.99,
    "contrast": 0.9 / 0.99,
    "sharpness": 0.9 / 0.99,
    "posterize": 4 / 6,
}
"""The strongest of each operation, as a share of the strongest in TrivialAugment; else all."""

SHIFT = 150 / 331
"""Farthest shift, as a share of the side."""


def rand_augment(
    images: Tensor, rng: np.random.Generator, *, operations: int, magnitude: int
) -> Tensor:
    """Apply random operations to each image of `[B, 3, H, W]` in 0..1, one after another.

    Args:
        images: a batch.
        rng: draws operations and signs.
        operations: how many for each image.
        magnitude: 0..30 of 30.
    """
    height, width = images.shape[2:]
    shares = SHARES | {
        "translate_x": SHIFT * width / min(32, width),
        "translate_y": SHIFT * height / min(32, height),
    }
    strongest = np.array([shares.get(name, 1.0) for name in OPERATIONS])
    for _ in range(operations):
        choice = rng.integers(len(OPERATIONS), size=len(images))
        sign = rng.integers(2, size=len(images)) * 2 - 1
        strength = strongest[choice] * magnitude / (BINS - 1)
        images = apply_chosen(images, choice, strength, sign)
    return images
