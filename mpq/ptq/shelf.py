"""Activations of all calibration images within a memory budget: what does not fit lies on disk.

The walk over a network needs the value of a tensor for every calibration image before it goes on,
which at 224 pixels is gigabytes. A `Shelf` keeps batches in memory until its budget is used up and
writes the others to temporary files, each read again when it is asked for. What comes back is bit
for bit what was put in.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 16
"""Tensors of fewer bytes always stay in memory: a file each would cost more than it saves."""


@dataclass(frozen=True)
class _OnDisk:
    """A tensor in a file."""

    path: Path

    def read(self) -> Tensor:
        return torch.from_numpy(np.load(self.path))

    def rows(self, index: Tensor) -> Tensor:
        mapped = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(mapped[index.numpy()])


class Kept:
    """One batch's value of a node: a tensor, or a structure of tensors and numbers."""

    def __init__(self, shelf: Shelf, value: Any) -> None:
        self._shelf, self._bytes = shelf, 0
        self._value = _map(value, self._store)

    def _store(self, tensor: Tensor) -> Tensor | _OnDisk:
        size = tensor.numel() * tensor.element_size()
        if size < SMALL or self._shelf.used + size <= self._shelf.budget:
            self._bytes += size
            self._shelf.used += size
            return tensor
        return self._shelf.write(tensor)

    def get(self) -> Any:
        """The value as it was put in."""
        return _map(self._value, lambda t: t.read() if isinstance(t, _OnDisk) else t)

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` `[B]` of a kept tensor `[N, ...]`."""
        if isinstance(self._value, _OnDisk):
            return self._value.rows(index)
        assert isinstance(self._value, Tensor)
        return self._value[index]

    def drop(self) -> None:
        """Give the room back."""
        self._shelf.used -= self._bytes
        _map(self._value, lambda t: t.path.unlink() if isinstance(t, _OnDisk) else None)
        self._value = None


class Shelf:
    """Room for activations.

    Args:
        budget: bytes to hold in memory; the rest goes to a temporary folder, which is removed when
            the shelf is closed.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self.written = budget, 0, 0
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Shelf:
        return self

    def __exit__(self, *_: object) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def put(self, value: Any) -> Kept:
        """Keep a value."""
        return Kept(self, value)

    def write(self, tensor: Tensor) -> _OnDisk:
        """Put a tensor into a file of its own."""
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="mpq-")
        path = Path(self._folder.name) / f"{self.written}.npy"
        self.written += 1
        np.save(path, tensor.numpy())
        return _OnDisk(path)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every tensor (or file) in a structure of tuples and lists."""
    if isinstance(value, (Tensor, _OnDisk)):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)([_map(v, function) for v in value])
    return value
