"""Activations of all calibration images within a memory budget: what does not fit lies on disk.

The walk over a network needs the value of a tensor for every calibration image before it goes on,
which at 224 pixels is gigabytes. An `ActivationStore` keeps batches in memory until its budget is
used up and writes the others to temporary files, each read again when it is asked for. What comes
back is bit for bit what was put in.
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
from torch.utils import _pytree as pytree

from mpq.files import refuse_full

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


class Stored:
    """One batch's value of a node: a tensor, or a structure of tensors and numbers."""

    def __init__(self, store: ActivationStore, value: Any) -> None:
        self._store, self._bytes = store, 0
        self._value = _map(value, self._place)

    def _place(self, tensor: Tensor) -> Tensor | _OnDisk:
        size = tensor.numel() * tensor.element_size()
        if size < SMALL or self._store.used + size <= self._store.budget:
            self._bytes += size
            self._store.used += size
            return tensor
        return self._store.write(tensor)

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
        """Give the room back; a second time it does nothing."""
        if self._value is None:
            return
        self._store.used -= self._bytes
        _map(self._value, lambda t: t.path.unlink() if isinstance(t, _OnDisk) else None)
        self._value = None


class ActivationStore:
    """Activations in memory up to a budget, and in files beyond it.

    Args:
        budget: bytes to hold in memory; the rest goes to a temporary folder, which is removed when
            the store is closed.

    Attributes:
        folder: of the files, once there is one.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self.used, self.written = budget, 0, 0
        self.folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ActivationStore:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.folder is not None:
            with self.folder as folder:
                if error is not None:
                    refuse_full(Path(folder), error)

    def put(self, value: Any) -> Stored:
        """Keep a value."""
        return Stored(self, value)

    def write(self, tensor: Tensor) -> _OnDisk:
        """Put a tensor into a file of its own."""
        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="mpq-")
        path = Path(self.folder.name) / f"{self.written}.npy"
        self.written += 1
        np.save(path, tensor.numpy())
        return _OnDisk(path)


def _map(value: Any, function: Callable[[Any], Any]) -> Any:
    """Apply a function to every tensor (or file) in a tree."""
    if isinstance(value, (Tensor, _OnDisk)):  # nearly always: walking a tree takes 0.1 ms
        return function(value)
    return pytree.tree_map_only((Tensor, _OnDisk), function, value)
