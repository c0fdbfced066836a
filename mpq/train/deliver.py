"""Batches that worker processes make while a step runs, by torch's `DataLoader`.

An item of the loader is a whole batch, named by the indices of its samples. So order, and the share
of each process, are decided by whoever asks, and do not depend on the number of workers; nor do
random transforms, which are seeded by sample.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mpq.batch import each
from mpq.data.stream import Stream, workers
from mpq.errors import DataError, MpqError
from mpq.userimport import raised

Read = Callable[[Any], Any]


@dataclass(frozen=True)
class _Failed:
    """What a worker could not do: an exception that crosses processes becomes a traceback."""

    message: str


class _Batches(Dataset[Any]):
    def __init__(self, read: Read, parts: Sequence[Any]) -> None:
        self.read, self.parts = read, parts

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, at: int) -> Any:
        try:
            return self.read(self.parts[at])
        except MpqError as error:
            return _Failed(str(error))
        except Exception as error:  # the user's code can fail in any way
            return _Failed(f"the data failed with {raised(error)}")


def deliver(read: Read, parts: Sequence[Any], count: int | None = None) -> Iterator[Any]:
    """What `read` makes of each part, in order; arrays become tensors.

    Args:
        read: called in a worker process.
        parts: such as the indices of the images of each batch.
        count: of worker processes, at most; None: as `mpq.data.stream.workers`.

    Raises:
        DataError: `read` fails, or a worker dies.
    """
    count = min(workers() if count is None else count, len(parts))
    own = torch.Generator()  # the loader would draw from the random numbers of whoever trains
    loader = DataLoader(_Batches(read, parts), None, num_workers=count, generator=own)
    for found in each(loader):
        if isinstance(found, _Failed):
            raise DataError(found.message)
        yield found


def slices(images: Any, size: int) -> Iterator[Any]:
    """Images `[n, H, W, C]`, or a stream of them, some at a time, in order."""
    if not isinstance(images, Stream):
        yield from (images[at : at + size] for at in range(0, len(images), size))
        return
    parts = [slice(at, at + size) for at in range(0, len(images), size)]
    yield from (found.numpy() for found in deliver(images.__getitem__, parts))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed the random numbers of torch, numpy and Python, and put their states back."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])
    before = random.getstate(), np.random.get_state()  # the user's transforms use it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
