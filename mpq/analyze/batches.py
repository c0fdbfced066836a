"""Images in batches: resumable, and shared by the processes of `accelerate launch` or `torchrun`.

A metric gives a row of numbers for each image. Batches are the same whoever runs them and their
rows are put together in order, so that several processes, or one that was interrupted and goes on,
end with the scores of one that was not.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.batch import rows
from mpq.calls import Inputs, count, take
from mpq.files import atomic_file
from mpq.processes import ranks_of

Progress = Callable[[int, int], None]
"""Called with (done, total)."""
Rows = NDArray[np.float64]
SAVE_SECONDS = 5.0
"""Least time between two writes of what is done so far."""


@dataclass(frozen=True)
class Batch:
    """What a metric sees at a time.

    Args:
        index: number of the batch; random draws depend on it and on the seed alone.
        images: `[n, C, H, W]`, or inputs (`mpq.calls`).
        count: how many they are.
        labels: `[n]`, where there are any; for a loss of the user's own the whole batch as it takes
            it.
        tick: to be called after each step of work, as many times as `Batches.rows` was given.
    """

    index: int
    images: Inputs
    count: int
    labels: Any
    tick: Callable[[], None]


@dataclass(frozen=True)
class Batches:
    """Images to go through, some at a time.

    Args:
        images: `[N, C, H, W]`, normalised, or inputs.
        labels: `[N]` or None; for a loss of the user's own all batches as one (`mpq.batch.joined`).
        size: images at a time; bounds the memory.
        partial: where to keep what is done, to go on from there after an interruption; the name
            must say what is measured (a key), and the file goes when all is done.
        progress: called with (done, total) of this process's share.
    """

    images: Inputs
    labels: Any = None
    size: int = 64
    partial: Path | None = None
    progress: Progress | None = None

    def rows(self, measure: Callable[[Batch], Rows], *, ticks: int = 1) -> Rows:
        """What `measure` gives for all images, `[N, columns]` float64.

        Args:
            measure: rows `[n, columns]` of a batch.
            ticks: how often `measure` calls `tick`.
        """
        rank, ranks = ranks_of()
        mine = range(rank, -(-count(self.images) // self.size), ranks)
        store = _Store(self.partial and self.partial.with_suffix(f".{rank}of{ranks}.npz"))
        total = sum(self._batch(index).count for index in mine) * ticks
        done = sum(map(len, store.done.values())) * ticks

        def tick(images: int) -> None:
            nonlocal done
            done += images
            if self.progress:
                self.progress(done, total)

        for index in mine:
            if index not in store.done:
                store.add(index, measure(self._batch(index, tick)))
        found = gather(store.done)
        store.remove()
        return np.concatenate([found[i] for i in sorted(found)])

    def _batch(self, index: int, tick: Callable[[int], None] = lambda _: None) -> Batch:
        part = slice(index * self.size, (index + 1) * self.size)
        images = take(self.images, part)
        labels, found = rows(self.labels, part, count(self.images)), count(images)
        return Batch(index, images, found, labels, lambda: tick(found))


def gather(done: dict[int, Rows]) -> dict[int, Rows]:
    """The batches of all processes, in each of them."""
    if ranks_of()[1] == 1:
        return done
    from accelerate.utils import gather_object

    return dict(gather_object(list(done.items())))


class _Store:
    """Batches that are done, in a file that is written now and then."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.written = path, time.monotonic()
        self.done: dict[int, Rows] = {}
        if path is not None and path.is_file():
            try:
                with np.load(path, allow_pickle=False) as found:
                    self.done = {int(k): found[k] for k in found.files}
            except (OSError, ValueError, zipfile.BadZipFile):
                self.done = {}  # damaged: begin anew

    def add(self, index: int, rows: Rows) -> None:
        self.done[index] = rows
        if self.path is None or time.monotonic() - self.written < SAVE_SECONDS:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path) as file:
                np.savez(file, allow_pickle=False, **{str(k): v for k, v in self.done.items()})
        except OSError:
            self.path = None  # an interruption will cost time, nothing else
        self.written = time.monotonic()

    def remove(self) -> None:
        if self.path is not None:
            with suppress(OSError):  # of a folder that cannot be written to
                self.path.unlink(missing_ok=True)
