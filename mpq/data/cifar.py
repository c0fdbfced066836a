"""CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009) in the forms people keep them in.

The official python batches (the folders that torchvision unpacks), or images in folders or zip
archives. Label ids are the same, as the official class names are sorted. An `*-order.csv.gz`
beside archives gives images their official index, and with it the same splits as the batches.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.data.dataset import ArraySplit
from mpq.data.folders import Entry, open_folders
from mpq.data.images import as_channels
from mpq.data.splits import Splits
from mpq.errors import DataError

logger = logging.getLogger(__name__)

SIZE = (32, 32)


@dataclass(frozen=True, slots=True)
class Batches:
    """File and key names of the official python version."""

    folder: str
    classes: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: str
    names: str


CIFAR = {
    "cifar10": Batches(
        folder="cifar-10-batches-py",
        classes=10,
        train=tuple(f"data_batch_{i}" for i in range(1, 6)),
        test=("test_batch",),
        labels="labels",
        meta="batches.meta",
        names="label_names",
    ),
    "cifar100": Batches(
        folder="cifar-100-python",
        classes=100,
        train=("train",),
        test=("test",),
        labels="fine_labels",
        meta="meta",
        names="fine_label_names",
    ),
}


def batches_in(path: Path) -> Batches | None:
    """Which official python version a folder holds, if any."""
    return next((b for b in CIFAR.values() if (path / b.meta).is_file()), None)


def open_batches(
    path: Path, batches: Batches, size: tuple[int, int] | None, channels: int = 3
) -> Splits:
    """Data of an official python folder.

    Raises:
        DataError: a file is missing, damaged, or holds anything but arrays and labels.
    """
    names = _load(path / batches.meta).get(batches.names)
    if not isinstance(names, list) or len(names) != batches.classes:
        raise DataError(f"{path / batches.meta} must list {batches.classes} classes.")
    splits = []
    for files in (batches.train, batches.test):
        parts = [_read_batch(path / file, batches) for file in files]
        images = as_channels(np.concatenate([p[0] for p in parts]), channels, of=str(path))
        labels = np.concatenate([part[1] for part in parts])
        splits.append(ArraySplit(images, labels, size or SIZE))
    classes = tuple(map(str, names))
    return Splits(classes, splits[0], None, splits[1], size or SIZE)


def open_cifar_images(
    name: str, paths: Sequence[Path], size: tuple[int, int] | None, channels: int = 3
) -> Splits:
    """Data of image folders or archives, checked to be the data set of that name.

    Raises:
        DataError: as `open_folders`; another number of classes; no test split.
    """
    order = _official_order(paths[0].parent / f"{name}-order.csv.gz")
    found = open_folders(paths, size or SIZE, channels=channels, order=order)
    expected = CIFAR[name].classes
    places = ", ".join(map(str, paths))
    if len(found.classes) != expected:
        raise DataError(
            f"{name} must have {expected} classes. Got {len(found.classes)} in {places}."
        )
    test = found.test or found.validation
    if test is None:
        raise DataError(
            f"{name} must have train and test images. Got one split in {places}; "
            f"put {name}-train-*.zip and {name}-test.zip side by side."
        )
    counts = len(found.train), len(test)
    if counts != (50_000, 10_000):
        logger.warning("%s has %d training and %d test images, not 50000 and 10000", name, *counts)
    return found


def _official_order(path: Path) -> Callable[[Entry], int] | None:
    """Sort key from rows of `split,index,label,class/stem`, where that file exists."""
    if not path.is_file():
        return None
    try:
        with gzip.open(path, "rt", newline="") as file:
            index = {(row[0], row[3]): int(row[1]) for row in list(csv.reader(file))[1:]}
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise DataError(
            f"{path} must have rows split,index,label,class/stem: {error}. Remove or replace it."
        ) from error

    def key(entry: Entry) -> int:
        stem = entry.name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
        # An image without an index stands after the others; the sort is stable.
        return index.get((entry.split, f"{entry.label}/{stem}"), len(index))

    return key


def _read_batch(path: Path, batches: Batches) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    content = _load(path)
    rows, labels = content.get("data"), content.get(batches.labels)
    if (
        not isinstance(rows, np.ndarray)
        or not isinstance(labels, list)
        or rows.dtype != np.uint8
        or rows.shape != (len(labels), 3072)
        or not all(isinstance(label, int) for label in labels)
    ):
        raise DataError(f"{path} must hold uint8 rows [n, 3072] and n {batches.labels}.")
    images = rows.reshape(-1, 3, *SIZE).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy.core.numeric", "_frombuffer"): np.empty(0).__reduce_ex__(5)[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}
"""What the pickle of an array may call, in any version of numpy and Python."""


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that can build containers, bytes and numpy arrays, and call nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        key = module.replace("numpy._core", "numpy.core"), name
        if key not in _ALLOWED:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return _ALLOWED[key]


def _load(path: Path) -> dict[str, Any]:
    """Content of one batch file, with text keys.

    Raises:
        DataError: missing, damaged, or holding more than data.
    """
    try:
        # Written by Python 2: its text is bytes here.
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except FileNotFoundError:
        raise DataError(f"{path} is missing beside the other CIFAR files.") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise DataError(
            f"{path} must be a CIFAR file of arrays and labels. It cannot be read: {error}."
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a dictionary. Got {type(content).__name__}.")
    return {_text(key): _texts(value) for key, value in content.items()}


def _text(value: Any) -> Any:
    return value.decode("latin1") if isinstance(value, bytes) else value


def _texts(value: Any) -> Any:
    return [_text(item) for item in value] if isinstance(value, list) else value
