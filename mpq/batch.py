"""Batches as a training loop has them: what the network takes of one, and what comes with it.

A batch is inputs alone (a tensor), a tuple or list that begins with them, or a dict that has them
under one of `INPUTS`. The user's own losses and metrics get it as it came.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpq.calls import Inputs, count, leaves
from mpq.data.batches import INPUTS, LABELS
from mpq.errors import DataError, MpqError
from mpq.userimport import raised

SIGNALLED = 0.5
"""Seconds in which a signal tells that a worker died, after what was read from it has ended."""


def inputs_of(batch: Any) -> Inputs:
    """What the network is called with.

    Raises:
        DataError: the batch has another structure.
    """
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in INPUTS if key in batch), None)
    elif isinstance(batch, tuple | list):
        found = batch[0] if batch else None
    found = tuple(found) if isinstance(found, list) else found
    if not isinstance(found, Tensor | tuple | dict) or not leaves(found):
        raise DataError(
            "a batch must be a tensor of inputs, a tuple that begins with them, or a dict that has "
            f"them under {', '.join(INPUTS)}. Got {described(batch)}."
        )
    return found


def each(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches of the user's own, one after the other.

    Raises:
        DataError: they fail; a loader of torch tells so of its items and its workers.
    """
    number = -1
    try:
        for number, batch in enumerate(batches):  # noqa: B007
            yield batch
    except MpqError:
        raise
    except Exception as error:  # the user's code can fail in any way
        raise _failed(error, number + 1) from error


def _failed(error: Exception, number: int) -> DataError:
    try:
        if isinstance(error, OSError | EOFError):
            time.sleep(SIGNALLED)
        lost = died(error)
    except RuntimeError as signal:
        lost = died(signal)
    return lost or DataError(
        f"batch {number} of the data failed with {raised(error)}. Samples must have one size where "
        "they are stacked: let the data set bring them to it."
    )


def died(error: Exception) -> DataError | None:
    """What is said where torch's loader lost a worker, of which it tells anywhere; else None."""
    if not str(error).startswith("DataLoader worker"):
        return None
    return DataError(
        f"a process that reads data died: {str(error).splitlines()[0]} Usually memory ran out, or "
        "/dev/shm is full: try fewer --workers, smaller batches, or --workers 0. What was finished "
        "is kept; --resume goes on from there."
    )


def targets_of(batch: Any) -> Any:
    """What comes with the inputs: the rest of a tuple, the labels of a dict or else all of it.

    None where nothing does.
    """
    if isinstance(batch, Mapping):
        return next((batch[key] for key in LABELS if key in batch), batch)
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        return None
    return batch[1] if len(batch) == 2 else tuple(batch[1:])


def moved(tree: Any, device: torch.device | str) -> Any:
    """A batch or an answer with its tensors there, without their gradients."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().to(device), tree)


def described(value: Any) -> str:
    """What a batch or an answer is, for messages: shapes of tensors, names of types."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {described(v)}" for key, v in value.items()) + "}"
    if isinstance(value, tuple | list):
        more = ", ..." if len(value) > 6 else ""
        return f"{type(value).__name__} of ({', '.join(map(described, value[:6]))}{more})"
    return type(value).__name__


def rows(batch: Any, picked: slice | int, total: int, *, whole: bool = True) -> Any:
    """Some samples of a batch, or one: of tensors and lists with an entry for each of `total`.

    All else goes with any of them, and so does the list itself that a `whole` batch may be.
    """
    if isinstance(batch, Tensor):
        return batch[picked] if batch.ndim and len(batch) == total else batch
    if isinstance(batch, list) and len(batch) == total and not whole:
        return batch[picked]
    if isinstance(batch, Mapping):
        return {key: rows(value, picked, total, whole=False) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(rows(value, picked, total, whole=False) for value in batch)
    return batch


def stacked(batch: Any, samples: list[Any], total: int, *, whole: bool = True) -> Any:
    """Samples in the structure of the batch that they come from: the way back from `rows`."""
    if isinstance(batch, Tensor):
        return torch.stack(samples) if batch.ndim and len(batch) == total else batch
    if isinstance(batch, list) and len(batch) == total and not whole:
        return samples
    if isinstance(batch, Mapping):
        return {key: stacked(value, [s[key] for s in samples], total, whole=False)
                for key, value in batch.items()}  # fmt: skip
    if isinstance(batch, tuple | list):
        parts = zip(batch, zip(*samples, strict=True), strict=True)
        return type(batch)(stacked(v, list(s), total, whole=False) for v, s in parts)
    return batch


def shared(batch: Any, rank: int, ranks: int) -> Any:
    """The share of a batch that one of several processes takes: every `ranks`-th sample."""
    return batch if ranks == 1 else rows(batch, slice(rank, None, ranks), count(inputs_of(batch)))


def joined(batches: Sequence[Any]) -> Any:
    """Several batches as one: tensors and lists are joined, all else is taken from the first.

    Raises:
        DataError: they differ in structure, or in the size of a sample.
    """
    first = batches[0]
    try:
        if isinstance(first, Tensor):
            return torch.cat(list(batches)) if first.ndim else first
        if isinstance(first, Mapping):
            return {key: joined([one[key] for one in batches]) for key in first}
        if isinstance(first, list) and not any(isinstance(v, Tensor) for v in first):
            return [entry for one in batches for entry in one]
        if isinstance(first, tuple | list):
            return type(first)(map(joined, zip(*batches, strict=True)))
    except (RuntimeError, KeyError, ValueError, TypeError):
        other = next((b for b in batches if described(b) != described(first)), batches[-1])
        raise DataError(
            "all batches must have one structure, and their samples one size. Got "
            f"{described(first)} and {described(other)}."
        ) from None
    return first
