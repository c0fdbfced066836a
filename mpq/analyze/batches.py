"""Images in batches: resumable, and shared by the processes of `accelerate launch` or `torchrun`.

A metric gives a row of numbers for each image. Batches are the same whoever runs them and their
rows are put together in order, so that several processes, or one that was interrupted and goes on,
end with the scores of one that was not.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

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
        images: `[n, C, H, W]`.
        labels: `[n]`, where there are any.
        tick: to be called after each step of work, as often as `over_batches` was told.
    """

    index: int
    images: Tensor
    labels: Tensor | None
    tick: Callable[[], None] = field(default=lambda: None)


def over_batches(
    measure: Callable[[Batch], Rows],
    images: Tensor,
    labels: Tensor | None,
    *,
    batch: int,
    ticks: int = 1,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> Rows:
    """The rows of all images, `[N, columns]` float64.

    Args:
        measure: rows `[n, columns]` of a batch.
        images: `[N, C, H, W]`.
        labels: `[N]` or None.
        batch: images at a time.
        ticks: how often `measure` calls `tick`.
        partial: where to keep what is done, to go on from there after an interruption; the name
            must say what is measured (a key), and the file goes when all is done.
        progress: told (done, total) of this process's share.
    """
    rank, ranks = ranks_of()
    mine = range(rank, -(-len(images) // batch), ranks)
    store = _Store(partial.with_suffix(f".{rank}of{ranks}.npz") if partial else None)
    total = sum(len(images[i * batch : (i + 1) * batch]) for i in mine) * ticks
    count = sum(len(rows) for rows in store.done.values()) * ticks
    for index in mine:
        if index in store.done:
            continue
        part = slice(index * batch, (index + 1) * batch)
        size = len(images[part])

        def tick(size: int = size) -> None:
            nonlocal count
            count += size
            if progress:
                progress(count, total)

        some = None if labels is None else labels[part]
        store.add(index, measure(Batch(index, images[part], some, tick)))
    rows = gather(store.done)
    store.remove()
    return np.concatenate([rows[i] for i in sorted(rows)])


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
            self.path.unlink(missing_ok=True)
