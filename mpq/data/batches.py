"""Batches in any form that PyTorch users have, as arrays by name of input and class ids. No torch.

A batch is an array or a tensor, a tuple of inputs and labels, or a dict. What a network takes says
which of its parts are inputs: `(image, ids, label)` of one that takes two is two inputs and labels.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mpq.errors import DataError
from mpq.inputs import InputSpecs
from mpq.limits import current

INPUTS = ("pixel_values", "image", "images", "img", "x", "input", "inputs")
"""Where a dict has the only input."""
LABELS = ("labels", "label", "target", "targets", "y", "class")
Named = tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]
"""Arrays `[n, ...]` by name of input, and class ids `[n]` if there are any."""


def parts(batch: Any, takes: InputSpecs | None, where: str) -> Named:
    """The inputs and the class ids of a batch.

    Args:
        batch: in any of the forms above.
        takes: the inputs of a network that takes more than one batch of images; None: of images.
        where: names the batch in messages.

    Raises:
        DataError: inputs are missing, or are no arrays of one length.
    """
    names = list(dict.fromkeys(name.partition(".")[0] for name in takes)) if takes else []
    return named(*_divided(batch, names, where), where)


def named(inputs: Any, labels: Any, where: str) -> Named:
    """Inputs, nested as the network takes them, and class ids, if labels are some.

    Raises:
        DataError: inputs are no arrays of one length.
    """
    found = {name: _array(value, name, where) for name, value in _leaves(inputs)}
    if not found or len({len(array) for array in found.values()}) != 1:
        sizes = ", ".join(f"{name} {list(array.shape)}" for name, array in found.items())
        raise DataError(
            f"{where} must hold arrays or tensors [n, ...] of one length n. Got "
            f"{sizes or type(inputs).__name__}."
        )
    return found, _class_ids(labels, len(next(iter(found.values()))))


def joined(batches: Iterable[Named], where: str) -> Named:
    """All batches in one; class ids only if each has them.

    Raises:
        DataError: there is none, or they differ in their inputs or sizes.
    """
    inputs: list[dict[str, NDArray[Any]]] = []
    labels: list[NDArray[np.int64] | None] = []
    for one, of in batches:
        inputs.append(one)
        labels.append(of)
    if not inputs:
        raise DataError(f"{where} must give at least one batch. Got none.")
    names = list(inputs[0])
    try:
        arrays = {name: np.concatenate([one[name] for one in inputs]) for name in names}
    except (KeyError, ValueError) as error:
        raise DataError(
            f"the batches of {where} must have the same inputs, of the same sizes: {error}."
        ) from None
    known = [ids for ids in labels if ids is not None]
    return arrays, np.concatenate(known) if len(known) == len(labels) else None


Item = TypeVar("Item")


def reservoir(stream: Iterable[Item], count: int, seed: int) -> list[Item]:
    """So many items of a stream in random order, each of its first with the same chance.

    Of more than `count` the limit `stream-samples` says how many are looked at. J. S. Vitter,
    "Random Sampling with a Reservoir", 1985, algorithm R.
    """
    rng, kept = random.Random(seed), list[Item]()
    most = max(count, int(current().stream_samples))
    for seen, item in enumerate(islice(stream, most)):
        at = seen if seen < count else rng.randrange(seen + 1)
        if at < count:
            kept[at : at + 1] = [item]
    rng.shuffle(kept)
    return kept


def _divided(batch: Any, names: Sequence[str], where: str) -> tuple[Any, Any]:
    """What is given to the network, and labels."""
    if isinstance(batch, Mapping):
        return _of_mapping(batch, names, where)
    if not isinstance(batch, (tuple, list)):
        return {_only(names, 1, where): batch}, None
    first, count = (batch[0] if batch else None), len(names) or 1
    if isinstance(first, Mapping):
        return _of_mapping(first, names, where)[0], batch[1] if len(batch) > 1 else None
    if isinstance(first, (tuple, list)):
        batch = (*first, *batch[1:])
    if len(batch) < count:
        _only(names, len(batch), where)
    values = dict(zip(names or ["input"], batch, strict=False))
    return values, batch[count] if len(batch) > count else None


def _of_mapping(batch: Mapping[Any, Any], names: Sequence[str], where: str) -> tuple[Any, Any]:
    found = {name: batch[name] for name in names if name in batch}
    if len(names) < 2 and not found:  # the only input may go by any of the usual names
        usual = next((key for key in INPUTS if key in batch), None)
        found = {} if usual is None else {names[0] if names else "input": batch[usual]}
    if len(found) < max(len(names), 1):
        raise DataError(
            f"{where} must have {' and '.join(names) or 'one of ' + ', '.join(INPUTS)}. Got the "
            f"keys {', '.join(map(str, batch))}."
        )
    labels = next((batch[key] for key in LABELS if key in batch and key not in found), None)
    return found, labels


def _only(names: Sequence[str], count: int, where: str) -> str:
    """The name of the only input.

    Raises:
        DataError: there are more.
    """
    if len(names) > count:
        raise DataError(
            f"{where} must have the inputs {', '.join(names)}, as a dict by these names or as a "
            f"tuple in this order. Got {count}."
        )
    return names[0] if names else "input"


def _leaves(inputs: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Arrays by path, as `mpq.calls.leaves` names tensors."""
    if isinstance(inputs, Mapping):
        pairs: Iterable[tuple[Any, Any]] = inputs.items()
    elif isinstance(inputs, (tuple, list)):
        pairs = enumerate(inputs)
    else:
        yield path, inputs
        return
    for key, value in pairs:
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _array(value: Any, name: str, where: str) -> NDArray[Any]:
    value = value.detach().cpu() if hasattr(value, "detach") else value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name} of {where} must be an array or a tensor: {error}") from None
    if array.dtype.kind not in "fiub" or not array.ndim:
        raise DataError(
            f"{name} of {where} must be an array or a tensor [n, ...] of numbers. Got "
            f"{type(value).__name__} of {array.dtype}, shape {list(array.shape)}."
        )
    return array


def _class_ids(labels: Any, count: int) -> NDArray[np.int64] | None:
    """Class ids `[n]`; None of anything else, which is not looked at."""
    if labels is None:
        return None
    labels = labels.detach().cpu() if hasattr(labels, "detach") else labels
    try:
        found = np.asarray(labels)
    except (TypeError, ValueError):
        return None
    known = found.shape == (count,) and found.dtype.kind in "iu"
    return found.astype(np.int64) if known else None
