"""Batch augmentation: each image gets its own random change, without a loop over images.

Random numbers come from a numpy generator on the CPU, so a seed gives the same images on every
device. Images travel as uint8 `[B, H, W, 3]` (shift and flip are index arithmetic there) and then
as float32 `[B, 3, H, W]` in 0..1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpq.train.evaluate import to_unit
from mpq.train.randaugment import rand_augment
from mpq.train.recipe import Recipe
from mpq.train.trivial import trivial_augment

ERASE_AREA = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)
"""Area and aspect of an erased rectangle (Zhong et al., Random Erasing, AAAI 2020)."""


@dataclass(frozen=True)
class Targets:
    """Labels of a batch, perhaps mixed: `share * one_hot(first) + (1 - share) * one_hot(second)`.

    Args:
        first: class ids `[B]`; -1 where an image has no label.
        second: class ids `[B]` of the partners; None if nothing was mixed.
        share: `[B]` in 0..1; None if nothing was mixed.
    """

    first: Tensor
    second: Tensor | None = None
    share: Tensor | None = None

    def for_classes(self, classes: int, *, partial: bool = False) -> Tensor:
        """Class ids `[B]`, or probabilities `[B, classes]` if mixed or `partial`.

        With `partial` some images may have no label: their part of a row is zero.
        """
        if self.second is None or self.share is None:
            return _one_hot(self.first, classes).float() if partial else self.first
        share = self.share.unsqueeze(1)
        mixed = share * _one_hot(self.first, classes)
        return mixed + (1 - share) * _one_hot(self.second, classes)


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """`[B, classes]`, a row of zeros where a label is -1."""
    return F.one_hot(labels.clamp(min=0), classes) * (labels >= 0).unsqueeze(1)


def augment(images: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """All changes within an image: `[B, H, W, 3]` uint8 to `[B, 3, H, W]` float32 in 0..1."""
    if recipe.crop or recipe.flip:
        images = shift_flip(images, recipe.crop, recipe.flip, rng)
    out = to_unit(images)
    if recipe.trivial:
        out = trivial_augment(out, rng)
    if recipe.rand_operations:
        out = rand_augment(
            out, rng, operations=recipe.rand_operations, magnitude=recipe.rand_magnitude
        )
    if recipe.erase:
        out = erase(out, recipe.erase, rng)
    return out


def shift_flip(images: Tensor, crop: float, flip: bool, rng: np.random.Generator) -> Tensor:
    """Shift `[B, H, W, C]` by up to `crop` of a side, zeros moving in; mirror half of the images.

    The same as a random crop from the zero-padded image, followed by a random horizontal flip.
    """
    count, height, width, _ = images.shape
    rows, row_ok = _moved(count, height, round(crop * height), rng)
    cols, col_ok = _moved(count, width, round(crop * width), rng)
    if flip:
        mirrored = rng.random(count) < 0.5
        cols = np.where(mirrored[:, None], cols[:, ::-1], cols)
        col_ok = np.where(mirrored[:, None], col_ok[:, ::-1], col_ok)
    flat = (np.arange(count)[:, None] * height + rows)[:, :, None] * width + cols[:, None, :]
    device = images.device
    index = torch.from_numpy(flat.reshape(-1)).to(device, non_blocking=True)
    moved = images.reshape(count * height * width, -1).index_select(0, index).view(images.shape)
    if crop:
        inside = torch.from_numpy(row_ok[:, :, None] & col_ok[:, None, :])
        moved *= inside.to(device, non_blocking=True).unsqueeze(3)
    return moved


def _moved(
    count: int, side: int, reach: int, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Source positions `[count, side]` after a shift of -reach..reach, and which lie inside."""
    offset = rng.integers(-reach, reach + 1, size=(count, 1))
    position = np.arange(side) + offset
    return position.clip(0, side - 1), (position >= 0) & (position < side)


def erase(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Fill a random rectangle of some images `[B, C, H, W]` with their mean colour.

    Source: Zhong et al., Random Erasing Data Augmentation, AAAI 2020 (there: random or fixed fill).
    """
    count = len(images)
    area = rng.uniform(*ERASE_AREA, size=count)
    ratio = np.exp(rng.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1]), size=count))
    chosen = rng.random(count) < probability
    box = _boxes(images, np.sqrt(area * ratio), np.sqrt(area / ratio), rng)
    mask = box & torch.from_numpy(chosen).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return torch.where(mask, images.mean((2, 3), keepdim=True), images)


def mix(
    images: Tensor, labels: Tensor, recipe: Recipe, rng: np.random.Generator
) -> tuple[Tensor, Targets]:
    """MixUp or CutMix each chosen image `[B, C, H, W]` with a partner of the batch.

    Sources: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019. The share is drawn per
    image; for CutMix it is the area that is truly kept.
    """
    if not (recipe.mixup or recipe.cutmix):
        return images, Targets(labels)
    count, device = len(images), images.device
    chosen = rng.random(count) < recipe.mix_probability
    both = recipe.mixup > 0 and recipe.cutmix > 0
    cut = chosen & ((rng.random(count) < 0.5) if both else recipe.cutmix > 0)
    up = chosen & ~cut
    partner = torch.from_numpy(rng.permutation(count)).to(device, non_blocking=True)
    blend = np.where(up, rng.beta(recipe.mixup or 1, recipe.mixup or 1, size=count), 1)
    kept = np.where(cut, rng.beta(recipe.cutmix or 1, recipe.cutmix or 1, size=count), 1)
    side = np.sqrt(1 - kept)
    box = _boxes(images, side, side, rng)  # empty where nothing is cut
    lam = torch.from_numpy(blend.astype(np.float32)).to(device, non_blocking=True)
    other = images[partner]
    out = torch.lerp(other, images, lam.view(-1, 1, 1, 1))
    out = torch.where(box, other, out)
    share = lam * (1 - box.float().mean((1, 2, 3)))
    return out, Targets(labels, labels[partner], share)


def _boxes(
    images: Tensor, tall: NDArray[np.float64], wide: NDArray[np.float64], rng: np.random.Generator
) -> Tensor:
    """Masks `[B, 1, H, W]`: rectangles of these relative sides, centred anywhere, clipped."""
    rows = _span(images.shape[2], tall, rng)
    cols = _span(images.shape[3], wide, rng)
    mask = rows[:, :, None] & cols[:, None, :]
    return torch.from_numpy(mask).to(images.device, non_blocking=True).unsqueeze(1)


def _span(side: int, length: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Which of `side` positions lie within a random interval of that relative length."""
    size = np.round(length * side)[:, None]
    start = np.floor(rng.uniform(0, side, size=(len(length), 1)) - size / 2)
    position = np.arange(side)
    inside: NDArray[np.bool_] = (position >= start) & (position < start + size)
    return inside


def epoch_rng(seed: int, epoch: int, part: int = 0) -> np.random.Generator:
    """The generator of one epoch: nothing that happened before has a part in it."""
    return np.random.default_rng([seed % 2**32, epoch, part])
