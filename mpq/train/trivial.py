"""TrivialAugmentWide and RandAugment for a batch: random operations on each image.

TrivialAugment draws one, of random strength.

Source: Müller and Hutter, TrivialAugment: Tuning-free Yet State-of-the-Art Data Augmentation, ICCV
2021, with the wide space as torchvision defines it (31 strengths, nearest-neighbour geometry, black
outside). The images of a batch are grouped by operation and each group is computed at once, on
float32 `[B, 3, H, W]` in 0..1.

RandAugment takes some of these operations in a row, each over a part of its range (Cubuk et al.,
RandAugment: Practical Automated Data Augmentation with a Reduced Search Space, CVPR Workshops 2020,
with the ranges as torchvision defines them).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpq.train.evaluate import send

BINS = 31
GREY = (0.2989, 0.587, 0.114)
"""Luma weights of RGB."""

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(images `[N, 3, H, W]`, strength `[N]` in 0..1, sign `[N]` of -1 or 1) -> images."""


def trivial_augment(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Apply one random operation to each image of `[B, 3, H, W]` in 0..1."""
    names = list(OPERATIONS)
    choice = rng.integers(len(names), size=len(images))
    strength = rng.integers(BINS, size=len(images)) / (BINS - 1)
    sign = rng.integers(2, size=len(images)) * 2 - 1
    return apply_chosen(images, choice, strength, sign)


def apply_chosen(
    images: Tensor, choice: NDArray[Any], strength: NDArray[Any], sign: NDArray[Any]
) -> Tensor:
    """Operation `choice` (`[B]`, of `OPERATIONS` in order) at this strength and sign, per image."""
    names = list(OPERATIONS)
    order = np.argsort(choice, kind="stable")
    device = images.device
    index = send(order, device)
    strengths = send(strength[order].astype(np.float32), device)
    signs = send(sign[order].astype(np.float32), device)
    sizes = np.bincount(choice, minlength=len(names)).tolist()
    parts = [torch.split(t, sizes) for t in (images[index], strengths, signs)]
    groups = zip(names, *parts, strict=True)
    done = [OPERATIONS[n](x, s, g) if len(x) else x for n, x, s, g in groups]
    out = torch.empty_like(images)
    out[index] = torch.cat(done)
    return out


def _column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """`factor` 1 keeps the image, 0 gives `other`, above 1 moves away from it."""
    return (other + (images - other) * _column(factor)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    if images.shape[1] != len(GREY):
        return images.mean(1, keepdim=True)
    return sum(
        (w * images[:, i : i + 1] for i, w in enumerate(GREY)), torch.zeros_like(images[:, :1])
    )


def _affine(images: Tensor, *matrix: Tensor | float) -> Tensor:
    """Sample with `[[a b c], [d e f]]` (each of all images or `[N]`) from output to input.

    In pixels from the centre; black outside.
    """
    height, width = images.shape[2:]
    each = torch.ones(len(images), device=images.device)
    relative = torch.stack([value * each for value in matrix], dim=1).view(-1, 2, 3)
    # affine_grid counts in half sides
    relative[:, 0, 1] *= height / width
    relative[:, 1, 0] *= width / height
    relative[:, 0, 2] /= width / 2
    relative[:, 1, 2] /= height / 2
    grid = F.affine_grid(relative, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="nearest", align_corners=False)


def shear_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Rows shifted in proportion to their distance from the top, by up to 0.99 of it."""
    level = 0.99 * strength * sign
    return _affine(images, 1, level, level * images.shape[2] / 2, 0, 1, 0)


def shear_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Columns shifted in proportion to their distance from the left, by up to 0.99 of it."""
    level = 0.99 * strength * sign
    return _affine(images, 1, 0, 0, level, 1, level * images.shape[3] / 2)


def translate_x(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Shift by up to 32 pixels, at most the width."""
    level = (min(32, images.shape[3]) * strength).floor() * sign
    return _affine(images, 1, 0, -level, 0, 1, 0)


def translate_y(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Shift by up to 32 pixels, at most the height."""
    level = (min(32, images.shape[2]) * strength).floor() * sign
    return _affine(images, 1, 0, 0, 0, 1, -level)


def rotate(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Rotate about the centre by up to 135 degrees."""
    angle = torch.deg2rad(135 * strength * sign)
    cos, sin = angle.cos(), angle.sin()
    return _affine(images, cos, -sin, 0, sin, cos, 0)


def brightness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Towards black, or away from it."""
    return _blend(images, torch.zeros_like(images), 1 + 0.99 * strength * sign)


def color(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Towards grey, or away from it."""
    return _blend(images, _grey(images), 1 + 0.99 * strength * sign)


def contrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Towards the mean luma, or away from it."""
    return _blend(images, _grey(images).mean((2, 3), keepdim=True), 1 + 0.99 * strength * sign)


def sharpness(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Towards a 3x3 blur, or away from it; the border stays."""
    if min(images.shape[2:]) <= 2:
        return images
    channels = images.shape[1]
    kernel = torch.ones(channels, 1, 3, 3, device=images.device) / 13
    kernel[:, :, 1, 1] = 5 / 13
    blurred = images.clone()
    blurred[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=channels)
    return _blend(images, blurred, 1 + 0.99 * strength * sign)


def posterize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Keep 8 down to 2 bits of each channel."""
    levels = _column(torch.exp2((8 - 6 * strength).round()))
    return (images * levels).floor().clamp(min=0).minimum(levels - 1) / levels


def solarize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Invert what is at or above a threshold of 1 down to 0."""
    return torch.where(images >= _column(1 - strength), 1 - images, images)


def autocontrast(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Stretch each channel to 0..1; a constant channel stays."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    span = high - low
    return torch.where(span > 0, (images - low) / span.clamp(min=1e-12), images).clamp(0, 1)


def equalize(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """Flatten the histogram of each channel (256 levels, rounding as in Pillow's ImageOps)."""
    level = (images * 255.999).long().clamp(0, 255).flatten(2)
    counts = torch.zeros(*level.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, level, torch.ones_like(level))
    top = counts.gather(2, level.amax(2, keepdim=True))
    step = (level.shape[2] - top) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    flat = table.gather(2, level).float() / 255
    return torch.where(step > 0, flat, images.flatten(2)).view_as(images)


def identity(images: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """No change."""
    return images


OPERATIONS: dict[str, Operation] = {
    "identity": identity,
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": brightness,
    "color": color,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
}

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
