"""Which images: seeded, stratified, without replacement.

One idea serves both functions. Shuffle; give each image its rank among those of its class; sort by
rank. A prefix of that order is balanced over the classes; with ranks divided by the class size it
is proportional to them instead. So a sample of 128 is also the beginning of the sample of 512.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.data.dataset import DataSet, Split, subset
from mpq.errors import DataError

logger = logging.getLogger(__name__)

TEST_SHARE = 0.2
HOLDOUT_SHARE = 0.1
TEST_SEED = 0
"""The test images of data without a test split never depend on a run's seed: otherwise a network
trained with one seed would be tested by the next on images it has seen."""


@dataclass(frozen=True)
class Splits:
    """What a reader found: `None` is a split that the data do not bring."""

    classes: tuple[str, ...]
    train: Split
    validation: Split | None
    test: Split | None
    size: tuple[int, int]
    pixels: bool = True


def divide(found: Splits, *, name: str, holdout: int | None, seed: int) -> DataSet:
    """Complete the splits that are missing.

    Without `test`, a given `validation` is the test split (ImageNet's custom), else 20 % of `train`
    are. Without `validation`, `holdout` images (10 %) of what is left of `train` are held out.

    Raises:
        DataError: a holdout that leaves no image to train on.
    """
    train, validation, test = found.train, found.validation, found.test
    if test is None:
        test, validation = validation, None
    if test is None:
        count = round(TEST_SHARE * len(train))
        held, rest = stratified(train.labels, count, TEST_SEED)
        train, test = subset(train, rest), subset(train, held)
    split_off = validation is None
    if validation is None:
        count = round(HOLDOUT_SHARE * len(train)) if holdout is None else holdout
        if not 0 <= count < len(train):
            raise DataError(
                f"holdout must be 0..{len(train) - 1}, as data {name} has {len(train)} training "
                f"images. Got {count}."
            )
        held, rest = stratified(train.labels, count, seed)
        train, validation = subset(train, rest), subset(train, held)
    elif holdout is not None:
        logger.warning("data %s bring their own validation split: holdout is not used", name)
    return DataSet(
        name, found.classes, train, validation, test, found.size, found.pixels, split_off
    )


def sample_indices(split: Split, count: int, seed: int) -> NDArray[np.int64]:
    """Indices of `count` images, each class equally often as far as it has enough images.

    Returns:
        `[min(count, len(split))]`, in an order whose every prefix is balanced too.

    Raises:
        DataError: a negative count.
    """
    if count < 0:
        raise DataError(f"the number of samples must be 0 or more. Got {count}.")
    return _by_rank(split.labels, seed, proportional=False)[:count]


def stratified(
    labels: NDArray[np.int64], count: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split indices into `count` held out, each class by its share, and the rest; both sorted."""
    order = _by_rank(labels, seed, proportional=True)
    return np.sort(order[:count]), np.sort(order[count:])


def _by_rank(labels: NDArray[np.int64], seed: int, *, proportional: bool) -> NDArray[np.int64]:
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = labels[order]
    grouped = np.argsort(shuffled, kind="stable")
    _, start, size = np.unique(shuffled[grouped], return_index=True, return_counts=True)
    rank = np.empty(len(labels), np.float64)
    rank[grouped] = np.arange(len(labels)) - np.repeat(start, size)
    if proportional:
        # Half a step, so that the first of a class of one does not lead every order.
        rank[grouped] = (rank[grouped] + 0.5) / np.repeat(size, size)
    return order[np.argsort(rank, kind="stable")].astype(np.int64)
