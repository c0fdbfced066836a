"""Data of the user's own: `package.module:factory`, a callable without arguments.

It returns a `DataSet`, a torch `Dataset` of pictures (`mpq.data.items`), a pair `(images, labels)`,
batches (a DataLoader, a list of them) in the forms of `mpq.data.batches`, a stream of items (an
`IterableDataset`) or of batches, or a mapping of split names to such values. In the place of images
may stand what the network takes: a tuple of arrays, or a dict of them by name.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.data.arrays import are_pixels, splits_of
from mpq.data.batches import Named, joined, parts, reservoir
from mpq.data.dataset import DataSet
from mpq.data.folders import SPLITS
from mpq.data.items import ItemSplit, is_items
from mpq.data.splits import Splits
from mpq.data.stream import too_large
from mpq.errors import DataError, nearest
from mpq.inputs import InputSpecs
from mpq.limits import current
from mpq.userimport import made_by

logger = logging.getLogger(__name__)
_BATCH = 64


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
    made = made_by(name, "--data", DataError)
    if isinstance(made, DataSet):
        if size is not None and size[-2:] != made.size and made.pixels:
            raise DataError(f"{name} gives images of {made.size}, but {size[-2:]} is asked for.")
        return made
    given = made if isinstance(made, Mapping) and not _is_batch(made, takes) else {"train": made}
    for split in given:
        if split not in SPLITS:
            raise DataError(
                f"{name} must give splits train, validation, test. Got {split!r}"
                f"{nearest(str(split), SPLITS)}"
            )
    values = {SPLITS[split]: value for split, value in given.items()}
    if "train" not in values:
        raise DataError(f"{name} must give a train split. Got {', '.join(values) or 'none'}.")
    streamed = None if takes else _pictures(values, size, name)
    if streamed is not None:
        return _labelled(streamed)
    found = {s: _read(v, takes, f"the {s} split of {name}") for s, v in values.items()}
    return splits_of(found, size, takes, name)


def _pictures(
    values: Mapping[str, Any], size: tuple[int, ...] | None, name: str
) -> dict[str, ItemSplit] | None:
    """Data sets of pictures as splits; None of anything else.

    A DataLoader whose pictures would not fit memory is read by its data set, in the order and by
    the processes that mpq chooses.
    """
    behind = {s: v if is_items(v) else getattr(v, "dataset", None) for s, v in values.items()}
    if not all(map(is_items, behind.values())):
        return None
    sides = (size[-2], size[-1]) if size else None
    channels = size[0] if size and len(size) == 3 else None
    found = {}
    for split, items in behind.items():
        try:
            made = ItemSplit(items, f"the {split} split of {name}", sides, channels)
        except DataError:
            if is_items(values[split]):
                raise
            return None
        if made.dtype != np.uint8 or (items is not values[split] and not too_large(made)):
            return None
        found[split] = made
    return found


def _labelled(found: dict[str, ItemSplit]) -> Splits:
    train, classes = found["train"], tuple[str, ...]()
    if all(split.labelled for split in found.values()):
        classes = tuple(map(str, range(int(train.labels.max()) + 1)))
    else:
        for split in found.values():
            split.labels = np.zeros(len(split), np.int64)
    size = train.shape[1], train.shape[2]
    return Splits(classes, train, found.get("validation"), found.get("test"), size)


def _collated(items: Any) -> Iterator[Any]:
    """The items of a data set, or of a stream, in batches."""
    each = (items[i] for i in range(len(items))) if is_items(items) else iter(items)
    while chunk := list(islice(each, _BATCH)):
        yield _stacked(chunk)


def _held(batches: Iterator[Named], where: str) -> list[Named]:
    """Of a stream, which may have no end, a sample of as many as are kept in memory."""
    items = _samples(batches)
    first = next(items, None)
    if first is None:
        return []
    room = 1 + int(current().arrays_mb * 1e6 // sum(array.nbytes for array in first[0].values()))
    found = reservoir(chain([first], items), room, 0)
    if next(items, None) is not None:
        logger.warning("%s: %d samples are taken (limits arrays-mb and stream-samples)",
                       where, len(found))  # fmt: skip
    return found


def _samples(batches: Iterable[Named]) -> Iterator[Named]:
    """Each sample as a batch of one, which does not hold on to the others."""
    for inputs, labels in batches:
        for at in range(len(next(iter(inputs.values())))):
            own = slice(at, at + 1)
            ids = None if labels is None else labels[own].copy()
            yield {name: array[own].copy() for name, array in inputs.items()}, ids


def _stacked(items: list[Any]) -> Any:
    """Items of one structure as a batch."""
    first = items[0]
    if isinstance(first, Mapping):
        return {key: _stacked([item[key] for item in items]) for key in first}
    if isinstance(first, tuple | list):
        return tuple(_stacked(list(part)) for part in zip(*items, strict=True))
    return np.stack([np.asarray(item) for item in items])


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
    behind = getattr(value, "dataset", value)
    stream = any(kind.__name__ == "IterableDataset" for kind in type(behind).__mro__)
    batches = _collated(value) if is_items(value) or (stream and behind is value) else value
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise DataError(
            f"{where} must be a DataSet, (images, labels) or a dict of those, a torch Dataset, or "
            f"batches. Got {type(value).__name__}."
        )
    each = (parts(batch, takes, f"a batch of {where}") for batch in batches)
    return joined(_held(each, where) if stream or isinstance(value, Iterator) else each, where)


def _is_pair(value: Any) -> bool:
    """Whether a value is inputs and labels, and no list of batches."""
    two = isinstance(value, tuple | list) and len(value) == 2
    return two and (isinstance(value, tuple) or getattr(value[1], "ndim", None) == 1)


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
