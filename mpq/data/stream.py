"""Images that are too many for memory: decoded when they are asked for, with the face of an array.

`view` and `mpq.data.load_arrays` give a `Stream` in the place of an array where the images would
take more than the limit `arrays-mb`; who goes through it in slices need not know.
"""

from __future__ import annotations

import zlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpq.data.dataset import Images, Indices, Labels, Samples, Split, Subset, subset
from mpq.errors import UsageError
from mpq.limits import current
from mpq.threads import allowed

MOST_WORKERS = 8
_workers: ContextVar[int | None] = ContextVar("workers", default=None)


def workers(processes: int = 1) -> int:
    """How many processes decode images for each of so many that train.

    As `set_workers` said, else one for each processor and at most `MOST_WORKERS`.
    """
    given = _workers.get()
    return min(MOST_WORKERS, max(1, allowed() // processes)) if given is None else given


def set_workers(count: int) -> None:
    """Say how many from here on; 0: the process that trains decodes too."""
    if count < 0:
        raise UsageError(f"--workers must be 0 or more. Got {count}.")
    _workers.set(count)


@dataclass(frozen=True, eq=False)
class Chain:
    """One split after another."""

    parts: tuple[Split, ...]

    @property
    def labels(self) -> Labels:
        """Class ids `[n]`."""
        return np.concatenate([part.labels for part in self.parts])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all images."""
        return len(self), *(shape_of(self.parts[0]) or ())[1:]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def read(self, indices: Indices) -> Images:
        """See `Split.read`."""
        found = [part.read([at]) for part, at in map(self._place, np.asarray(indices))]
        return np.concatenate(found)

    def picture(self, index: int) -> Image.Image:
        """See `FolderSplit.picture`."""
        return picture(*self._place(index))

    def _place(self, index: int) -> tuple[Split, int]:
        for part in self.parts:
            if index < len(part):
                return part, int(index)
            index -= len(part)
        raise IndexError(index)


@dataclass(frozen=True, eq=False)
class Stream:
    """The images of a split, read in slices or by indices as of an array `[n, H, W, C]`.

    Args:
        split: which they are.
        shape: of all of them.
        dtype: of their values.
    """

    split: Split
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ndim = 4

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Indices) -> Images:
        picked = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows)
        found: Images = self.split.read(picked)
        return found

    @property
    def nbytes(self) -> int:
        """What an array of them would take."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def mark(self) -> str:
        """Short text that differs for other files, without reading any image."""
        return f"{zlib.crc32(_mark(self.split).encode()):08x}"


def streamed(split: Split) -> Stream | None:
    """A split as a stream; None where it holds arrays already."""
    shape = shape_of(split)
    return None if shape is None else Stream(split, shape, getattr(_root(split), "dtype", _BYTES))


def too_large(split: Split) -> bool:
    """Whether its images are more than are held in memory."""
    found = streamed(split)
    return found is not None and found.nbytes > current().arrays_mb * 1e6


def view(split: Split, picked: NDArray[np.int64]) -> Samples:
    """Some samples of a split: read, or to be read where they are many."""
    chosen = subset(split, picked)
    return streamed(chosen) if too_large(chosen) else split.read(picked)


def picture(split: Split, index: int) -> Image.Image:
    """One image as it lies in its file, before it is brought to a size."""
    if isinstance(split, Subset):
        return picture(split.parent, int(split.indices[index]))
    if hasattr(split, "picture"):
        found: Image.Image = split.picture(index)
        return found
    return Image.fromarray(split.read([index])[0].squeeze())


def shape_of(split: Split) -> tuple[int, ...] | None:
    """Of all images of a split that are not in memory; None of others."""
    shape = getattr(_root(split), "shape", None)
    return None if shape is None else (len(split), *shape[1:])


_BYTES = np.dtype(np.uint8)


def _root(split: Split) -> Split:
    return split.parent if isinstance(split, Subset) else split


def _mark(split: Split) -> str:
    if isinstance(split, Subset):
        return f"{_mark(split.parent)} {zlib.crc32(split.indices.tobytes()):08x}"
    if isinstance(split, Chain):
        return " ".join(map(_mark, split.parts))
    own = getattr(split, "mark", None)
    return str(own()) if own else f"{shape_of(split)} {zlib.crc32(split.labels.tobytes()):08x}"
