"""Data of the user's own: `package.module:factory`, a callable without arguments.

It returns a `DataSet`, a pair `(images, labels)`, batches (a DataLoader, a list of them) in the
forms of `mpq.data.batches`, or a mapping of split names to such pairs or batches. In the place of
images may stand what the network takes: a tuple of arrays, or a dict of them by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.data.arrays import are_pixels, splits_of
from mpq.data.batches import Named, joined, parts
from mpq.data.dataset import DataSet
from mpq.data.folders import SPLITS
from mpq.data.splits import Splits
from mpq.errors import DataError, nearest
from mpq.inputs import InputSpecs
from mpq.userimport import import_callable, raised, working_directory


def open_factory(
    name: str, size: tuple[int, ...] | None, takes: InputSpecs | None = None
) -> Splits | DataSet:
    """Call the factory and check what it gives.

    Args:
        name: of the factory.
        size: `(H, W)` or `(C, H, W)` of images; None keeps their own.
        takes: inputs of a network that takes more than one batch of images.

    Raises:
        DataError: no such module or name, a factory that fails, or another kind of result.
    """
    made = _call(name)
    if isinstance(made, DataSet):
        if size is not None and size[-2:] != made.size and made.pixels:
            raise DataError(f"{name} gives images of {made.size}, but {size[-2:]} is asked for.")
        return made
    given = made if isinstance(made, Mapping) and not _is_batch(made, takes) else {"train": made}
    found: dict[str, Named] = {}
    for split, value in given.items():
        if split not in SPLITS:
            raise DataError(
                f"{name} must give splits train, validation, test. Got {split!r}"
                f"{nearest(str(split), SPLITS)}"
            )
        found[SPLITS[split]] = _read(value, takes, f"the {split} split of {name}")
    if "train" not in found:
        raise DataError(f"{name} must give a train split. Got {', '.join(found) or 'none'}.")
    return splits_of(found, size, takes, name)


def _is_batch(made: Mapping[Any, Any], takes: InputSpecs | None) -> bool:
    """Whether a mapping has inputs rather than splits."""
    return takes is not None and any(name.partition(".")[0] in made for name in takes)


def _read(value: Any, takes: InputSpecs | None, where: str) -> Named:
    """One split, given as a pair or as batches."""
    if _is_pair(value):
        if takes is None:
            return _check_pair(value, where)
        inputs, labels = value
        found = parts((inputs if isinstance(inputs, Mapping | tuple | list) else (inputs,), labels),
                      takes, where)  # fmt: skip
        if found[1] is None:
            _check_labels(labels, len(next(iter(found[0].values()))), where)
        return found
    if isinstance(value, Mapping):
        return parts(value, takes, where)
    if not isinstance(value, Iterable) or isinstance(value, str):
        raise DataError(
            f"{where} must be a DataSet, (images, labels) or a dict of those, or batches. "
            f"Got {type(value).__name__}."
        )
    return joined((parts(batch, takes, f"a batch of {where}") for batch in value), where)


def _is_pair(value: Any) -> bool:
    """Whether a value is inputs and labels, and no list of batches."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return isinstance(value, tuple) or getattr(value[1], "ndim", None) == 1


def _call(name: str) -> Any:
    factory = import_callable(name, "--data", DataError)
    try:
        with working_directory():
            return factory()
    except (Exception, SystemExit) as error:  # the user's code can fail in any way
        raise DataError(f"data {name} failed with {raised(error)}") from error


def _check_pair(pair: Any, where: str) -> Named:
    """Images and labels, or floats as the network takes them."""
    try:
        images, labels = np.asarray(pair[0]), np.asarray(pair[1])
    except ValueError as error:
        raise DataError(f"images and labels of {where} must be arrays: {error}") from None
    if images.dtype != np.float32 and not are_pixels({"input": images}):
        raise DataError(
            f"images of {where} must be uint8 [n, H, W, C], or [n, H, W] for grey, or float32 "
            f"[n, C, H, W] as the network takes them. Got {images.dtype} {list(images.shape)}."
        )
    return {"input": images}, _check_labels(labels, len(images), where)


def _check_labels(labels: Any, count: int, where: str) -> NDArray[np.int64]:
    found = np.asarray(labels)
    if found.shape != (count,) or found.dtype.kind not in "iu" or not count:
        raise DataError(
            f"labels of {where} must be integers [{count}], one per image, at least one. "
            f"Got {found.dtype} {list(found.shape)}."
        )
    return found.astype(np.int64)
