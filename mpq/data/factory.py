"""Data of the user's own: `package.module:factory`, a callable without arguments.

It returns a `DataSet`, a pair `(images, labels)`, or a mapping of split names to such pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpq.data.dataset import ArraySplit, DataSet
from mpq.data.folders import SPLITS
from mpq.data.splits import Splits
from mpq.errors import DataError, nearest
from mpq.userimport import import_callable, working_directory


def open_factory(name: str, size: tuple[int, int] | None) -> Splits | DataSet:
    """Call the factory and check what it gives.

    Raises:
        DataError: no such module or name, a factory that fails, or another kind of result.
    """
    made = _call(name)
    if isinstance(made, DataSet):
        if size is not None and size != made.size:
            raise DataError(f"{name} gives images of {made.size}, but {size} is asked for.")
        return made
    pairs = made if isinstance(made, Mapping) else {"train": made}
    arrays: dict[str, tuple[Any, Any]] = {}
    for split, pair in pairs.items():
        if split not in SPLITS:
            raise DataError(
                f"{name} must give splits train, validation, test. Got {split!r}"
                f"{nearest(str(split), SPLITS)}"
            )
        arrays[SPLITS[split]] = _check_pair(pair, f"the {split} split of {name}")
    if "train" not in arrays:
        raise DataError(f"{name} must give a train split. Got {', '.join(arrays) or 'none'}.")
    return _to_splits(arrays, size)


def _to_splits(arrays: dict[str, tuple[Any, Any]], size: tuple[int, int] | None) -> Splits:
    images, labels = arrays["train"]
    shape = size or (int(images.shape[1]), int(images.shape[2]))
    found = {split: ArraySplit(*pair, shape) for split, pair in arrays.items()}
    classes = tuple(str(i) for i in range(int(labels.max()) + 1))
    return Splits(classes, found["train"], found.get("validation"), found.get("test"), shape)


def _call(name: str) -> Any:
    factory = import_callable(name, "--data", DataError)
    try:
        with working_directory():
            return factory()
    except (Exception, SystemExit) as error:  # the user's code can fail in any way
        raise DataError(f"data {name} failed with {type(error).__name__}: {error}") from error


def _check_pair(pair: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise DataError(
            f"{where} must be a DataSet, (images, labels) or a dict of those. "
            f"Got {type(pair).__name__}."
        )
    try:
        images, labels = np.asarray(pair[0]), np.asarray(pair[1])
    except ValueError as error:
        raise DataError(f"images and labels of {where} must be arrays: {error}") from None
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        raise DataError(
            f"images of {where} must be uint8 [n, H, W, 3], or [n, H, W] for grey. "
            f"Got {images.dtype} {list(images.shape)}."
        )
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(
            f"labels of {where} must be integers [{len(images)}], one per image, at least one. "
            f"Got {labels.dtype} {list(labels.shape)}."
        )
    if images.shape[-1] == 1:
        images = np.repeat(images, 3, axis=-1)
    return images, labels.astype(np.int64)
