"""What a training learns from: arrays of images, or batches of the user's own, epoch by epoch.

Both say how many steps an epoch has, give this process's share of each, and look at the same first
images whenever they are asked.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mpq.batch import described, each, inputs_of, moved, shared
from mpq.calls import count
from mpq.data.stream import Stream, workers
from mpq.errors import DataError, UsageError
from mpq.train.augment import alternating, augment, epoch_rng, mix
from mpq.train.deliver import deliver
from mpq.train.evaluate import Images, Labels, as_tensor, to_unit
from mpq.train.plan import TrainingData, TrainingPlan
from mpq.train.recipe import Recipe
from mpq.train.resume import fingerprint
from mpq.train.transforms import Transform, Transformed, followed

RESIDENT_BYTES = 2**32
"""Images up to this size are kept on the accelerator."""


@dataclass(frozen=True)
class Share:
    """What one process takes of the data.

    Args:
        seed: of order and augmentation.
        device: where a step wants them.
        rank: this process.
        ranks: how many there are.
    """

    seed: int
    device: torch.device
    rank: int = 0
    ranks: int = 1


class Feed(Protocol):
    """The training data of one process."""

    steps: int
    """Of an epoch."""
    classes: int
    """That labels speak of."""
    partial: bool
    """Whether some images have no label."""

    def first(self, size: int) -> Any:
        """Some inputs as they lie: images in 0..1, or inputs of the user's."""

    def begin(self, view: int) -> Any:
        """Begin an epoch that sees this view of the data; some of its inputs, as of `first`."""

    def parts(self) -> Iterator[list[Any]]:
        """For each step of the epoch what `load` takes, in parts that are added up."""

    def size(self, part: Any) -> int:
        """Images of a part."""

    def load(self, part: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """Images in 0..1 with their labels, or inputs and batch of the user's, on the device."""

    def identity(self) -> str:
        """Short text that differs for other data."""


class Arrays:
    """Images in memory (on the device, if they fit), augmented batch by batch.

    Args:
        data: images and class ids, -1 where there is none.
        recipe: batch and augmentation.
        share: of this process.
    """

    LOOKED_AT = 256
    """Training images that choose activation ranges when widths change."""

    def __init__(self, data: tuple[Images, Labels], recipe: Recipe, share: Share) -> None:
        images, labels = data
        self.data, self.recipe, self.share = data, recipe, share
        if images.dtype != np.uint8 and (recipe.trivial or recipe.rand_operations):
            raise UsageError(
                "trivial and rand_operations change the colours of uint8 pixels, but these images "
                "are floats. Set both to 0 in the recipe, or change the images where they are read."
            )
        resident = share.device if self._held(images) else torch.device("cpu")
        self.images = self._take(images, resident)
        self.labels = as_tensor(labels.astype(np.int64)).to(resident)
        self.sides = torch.from_numpy(alternating(len(images), share.seed)).to(resident)
        self.classes, self.partial = int(labels.max()) + 1, int(labels.min()) < 0
        self.steps = max(1, len(images) // recipe.batch)
        self.steps = min(self.steps, recipe.epoch_steps or self.steps)
        self._mirrored: Tensor | None = None
        self._order = torch.arange(len(images))

    def _held(self, images: Images) -> bool:
        """Whether they are kept on the accelerator."""
        return images.nbytes <= RESIDENT_BYTES

    def _take(self, images: Images, place: torch.device) -> Any:
        return as_tensor(images).to(place)

    def _some(self, rows: Any) -> Tensor:
        """Some of the images, on the device."""
        found: Tensor = self.images[rows].to(self.share.device, non_blocking=True)
        return found

    def identity(self) -> str:
        """See `Feed.identity`."""
        return fingerprint(*self.data)

    def first(self, size: int) -> Tensor:
        """See `Feed.first`."""
        return to_unit(self._some(slice(size)))

    def begin(self, view: int) -> Any:
        """See `Feed.begin`."""
        order = torch.from_numpy(epoch_rng(self.share.seed, view).permutation(len(self.images)))
        self._order = order.to(self.labels.device)
        self._mirrored = self.sides ^ bool(view % 2) if self.recipe.alternate else None
        first = self._order[: self.LOOKED_AT]
        return lambda: to_unit(self._some(first))

    def parts(self) -> Iterator[list[Tensor]]:
        """See `Feed.parts`."""
        for step in range(self.steps):
            index = self._order[step * self.recipe.batch : (step + 1) * self.recipe.batch]
            split = index[self.share.rank :: self.share.ranks].tensor_split(self.recipe.accumulate)
            yield [part for part in split if len(part)]

    def size(self, part: Tensor) -> int:
        """See `Feed.size`."""
        return len(part)

    def _batch(self, part: Tensor) -> Tensor:
        """The images of a part, on the device."""
        return self._some(part)

    def load(self, part: Tensor, rng: np.random.Generator) -> tuple[Any, Any]:
        """See `Feed.load`."""
        images = self._batch(part)
        device = self.share.device
        labels = self.labels[part].to(device, non_blocking=True)
        mirrored = None if self._mirrored is None else self._mirrored[part].to(device)
        return mix(augment(images, self.recipe, rng, mirrored), labels, self.recipe, rng)


class Streamed(Arrays):
    """Images that worker processes decode while a step runs.

    In the order and with the augmentation of `Arrays`, whose answers are the same bit for bit.

    Args:
        transform: of the user's, applied to each picture as it lies in its file; None: it is
            brought to the network's size.
    """

    def __init__(
        self,
        data: tuple[Images, Labels],
        recipe: Recipe,
        share: Share,
        transform: Transform | None = None,
    ) -> None:
        super().__init__(data, recipe, share)
        self.transform, self._view = transform, 0
        self._coming: Iterator[Tensor] = iter(())

    def _held(self, images: Images) -> bool:
        return False

    def _take(self, images: Images, place: torch.device) -> Any:
        return images

    def _some(self, rows: Any) -> Tensor:
        picked = rows if isinstance(rows, slice) else rows.numpy()
        return as_tensor(self.images[picked]).to(self.share.device)

    def identity(self) -> str:
        """See `Feed.identity`."""
        return super().identity() + (f" {self.transform.name}" if self.transform else "")

    def begin(self, view: int) -> Any:
        """See `Feed.begin`."""
        self._view = view
        return super().begin(view)

    def parts(self) -> Iterator[list[Tensor]]:
        """See `Feed.parts`."""
        steps = list(super().parts())
        flat = [part.numpy() for step in steps for part in step]
        read = self.images.__getitem__
        if self.transform is not None:
            read = Transformed(self.images, self.transform, (self.share.seed, self._view))
        self._coming = deliver(read, flat, workers(self.share.ranks))
        yield from steps
        self._coming = iter(())  # the workers end with the epoch

    def _batch(self, part: Tensor) -> Tensor:
        return next(self._coming).to(self.share.device, non_blocking=True)


class Loader:
    """Batches as the user's own training loop has them; several processes share each one out.

    Args:
        batches: can be gone through again, in the same order for the same seed of torch.
        share: of this process; its seed is that of torch where an epoch begins.
        limit: batches of an epoch, of which the next goes on where the last one ended, behind the
            end from the beginning; 0: all of them.
        transform: of each sample, its targets with it.

    Raises:
        DataError: they have no length, and there is no limit.
    """

    classes, partial = 0, True

    def __init__(
        self,
        batches: Iterable[Any],
        share: Share,
        limit: int = 0,
        transform: Transform | None = None,
    ) -> None:
        if not limit and not _length(batches):
            raise DataError(
                "batches must have a length, at least 1, by which the learning rate is planned, or "
                f"epochs must: --set epoch_steps=N. Got {described(batches)}."
            )
        self.batches, self.share, self.limit, self.transform = batches, share, limit, transform
        self.steps, self._view = limit or _length(batches), 0
        self._next, self._going = -1, iter(())

    def identity(self) -> str:
        """See `Feed.identity`."""
        transformed = f", {self.transform.name}" if self.transform else ""
        first = described(moved(self._one(), "cpu"))
        return f"{self.steps} batches, the first {first}{transformed}"

    def first(self, size: int) -> Any:
        """See `Feed.first`: those of one batch, however many they are."""
        return moved(self._one(), self.share.device)

    def _one(self) -> Any:
        torch.manual_seed(self.share.seed)
        found = next(each(self.batches), None)
        if found is None:
            raise DataError(f"batches must come {self.steps} times an epoch. Got none.")
        return inputs_of(found)

    def begin(self, view: int) -> Any:
        """See `Feed.begin`."""
        self._view = view
        return lambda: self.first(0)

    def parts(self) -> Iterator[list[Any]]:
        """See `Feed.parts`.

        Raises:
            DataError: they end early.
        """
        share = self.share
        torch.manual_seed(share.seed + self._view)
        step = -1
        for step, batch in enumerate(self._going_on() if self.limit else each(self.batches)):
            own = shared(batch, share.rank, share.ranks)
            if self.transform is not None:
                own = followed(own, self.transform, (share.seed, self._view, step, share.rank))
            yield [own]
            if step == self.steps - 1:
                return
        raise DataError(
            f"batches must come {self.steps} times an epoch, as their length says. Got {step + 1}: "
            "an iterator can be read only once, so give a DataLoader or a list."
        )

    def _going_on(self) -> Iterator[Any]:
        """From where the last epoch ended; a run that is resumed goes there first."""
        if self._next != self._view:
            self._going = self._again_and_again()
            for _ in islice(self._going, self._view * self.steps):
                pass
            torch.manual_seed(self.share.seed + self._view)
        self._next = self._view + 1
        return self._going

    def _again_and_again(self) -> Iterator[Any]:
        for times in itertools.count():
            torch.manual_seed(self.share.seed + times)
            found = each(self.batches)
            first = next(found, None)
            if first is None:  # an iterator that was gone through
                return
            yield first
            yield from found

    def size(self, part: Any) -> int:
        """See `Feed.size`."""
        return count(inputs_of(part))

    def load(self, part: Any, rng: np.random.Generator) -> tuple[Any, Any]:
        """See `Feed.load`."""
        batch = moved(part, self.share.device)
        return inputs_of(batch), batch


def _length(batches: Any) -> int:
    """How many they are; 0 where that is not known."""
    try:
        return len(batches)
    except TypeError:
        return 0


def feed_of(data: TrainingData, plan: TrainingPlan, share: Share) -> Feed:
    """The batches of the user's own if there are any, else images.

    Raises:
        DataError: there are neither.
    """
    if data.batches is not None:
        return Loader(data.batches, share, plan.recipe.epoch_steps, plan.transform)
    if data.train is None:
        raise DataError("training needs images or batches. Got neither.")
    if plan.transform or isinstance(data.train[0], Stream):
        return Streamed(data.train, plan.recipe, share, plan.transform)
    return Arrays(data.train, plan.recipe, share)
