"""Batches as a training loop has them: what the network takes of one, and what comes with it.

A batch is inputs alone (a tensor), a tuple or list that begins with them, or a dict that has them
under one of `INPUTS`. The user's own losses and metrics get it as it came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mpq.calls import Inputs, count, leaves
from mpq.data.batches import INPUTS, LABELS
from mpq.errors import DataError


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


def rows(batch: Any, picked: slice, total: int) -> Any:
    """Some samples of a batch: of tensors and lists that hold one entry for each of `total`.

    All else goes with any of them.
    """
    if isinstance(batch, Tensor):
        return batch[picked] if batch.ndim and len(batch) == total else batch
    if isinstance(batch, list) and len(batch) == total:
        return batch[picked]
    if isinstance(batch, Mapping):
        return {key: rows(value, picked, total) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(rows(value, picked, total) for value in batch)
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
