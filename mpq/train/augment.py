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

from mpq.train.evaluate import send, to_unit
from mpq.train.recipe import Recipe
from mpq.train.trivial import rand_augment, trivial_augment

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


def augment(
    images: Tensor,
    recipe: Recipe,
    rng: np.random.Generator,
    mirrored: Tensor | None = None,
) -> Tensor:
    """All changes within an image: `[B, H, W, 3]` uint8 to `[B, 3, H, W]` float32 in 0..1.

    `mirrored` `[B]` says which images are mirrored, in place of what the recipe would draw.
    """
    if recipe.crop or recipe.flip:
        images = shift_flip(images, recipe.crop, recipe.flip, rng, mirrored)
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


def shift_flip(
    images: Tensor,
    crop: float,
    flip: bool,
    rng: np.random.Generator,
    mirrored: Tensor | None = None,
) -> Tensor:
    """Shift `[B, H, W, C]` by up to `crop` of a side, zeros moving in; mirror half of the images.

    The same as a random crop from the zero-padded image, followed by a random horizontal flip.
    With `flip`, `mirrored` `[B]` says which images, instead of chance.
    """
    count, height, width, _ = images.shape
    device = images.device
    # What is large is made on the device: only a row and a column of each image travel there.
    row, row_ok = _moved(count, height, round(crop * height), rng, device)
    col, col_ok = _moved(count, width, round(crop * width), rng, device)
    if flip:
        if mirrored is None:
            mirrored = send(rng.random(count) < 0.5, device)
        col = torch.where(mirrored.unsqueeze(1), col.flip(1), col)
        col_ok = torch.where(mirrored.unsqueeze(1), col_ok.flip(1), col_ok)
    first = torch.arange(count, device=device).unsqueeze(1) * height
    flat = ((first + row) * width).unsqueeze(2) + col.unsqueeze(1)
    moved = images.reshape(count * height * width, -1).index_select(0, flat.flatten())
    moved = moved.view(images.shape)
    if crop:
        moved *= (row_ok.unsqueeze(2) & col_ok.unsqueeze(1)).unsqueeze(3)
    return moved


def alternating(count: int, seed: int) -> NDArray[np.bool_]:
    """Which of so many images are mirrored in every even epoch; the others in every odd one.

    So two epochs in a row see both sides of each image (Jordan 2024, arXiv:2404.00498).
    """
    return np.random.default_rng([seed % 2**32, count]).random(count) < 0.5


def _moved(
    count: int, side: int, reach: int, rng: np.random.Generator, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Source positions `[count, side]` after a shift of -reach..reach, and which lie inside."""
    offset = rng.integers(-reach, reach + 1, size=(count, 1))
    position = np.arange(side) + offset
    inside = (position >= 0) & (position < side)
    return send(position.clip(0, side - 1), device), send(inside, device)


def erase(images: Tensor, probability: float, rng: np.random.Generator) -> Tensor:
    """Fill a random rectangle of some images `[B, C, H, W]` with their mean colour.

    Source: Zhong et al., Random Erasing Data Augmentation, AAAI 2020 (there: random or fixed fill).
    """
    count = len(images)
    area = rng.uniform(*ERASE_AREA, size=count)
    ratio = np.exp(rng.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1]), size=count))
    chosen = rng.random(count) < probability
    box = _boxes(images, np.sqrt(area * ratio), np.sqrt(area / ratio), rng)
    mask = box & send(chosen, images.device).view(-1, 1, 1, 1)
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
    partner = send(rng.permutation(count), device)
    blend = np.where(up, rng.beta(recipe.mixup or 1, recipe.mixup or 1, size=count), 1)
    kept = np.where(cut, rng.beta(recipe.cutmix or 1, recipe.cutmix or 1, size=count), 1)
    side = np.sqrt(1 - kept)
    box = _boxes(images, side, side, rng)  # empty where nothing is cut
    lam = send(blend.astype(np.float32), device)
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
    row, col = send(rows, images.device), send(cols, images.device)
    return (row.unsqueeze(2) & col.unsqueeze(1)).unsqueeze(1)


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
