"""Networks that take anything, and their data, given as values: arrays by name of input."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from mpq.batch import each, inputs_of, rows
from mpq.batch import joined as together
from mpq.calls import count as length_of
from mpq.calls import leaves
from mpq.capture.network import Network, holds_tensor
from mpq.checkpoint import weights_hash
from mpq.data import DataSet
from mpq.data.arrays import fitting
from mpq.data.batches import LABELS, Named, joined, parts, reservoir
from mpq.data.dataset import InputSplit
from mpq.data.normalize import NAMED
from mpq.errors import DataError
from mpq.inputs import InputSpecs
from mpq.pipeline.subject import GIVEN, Subject
from mpq.policy import ModelInfo
from mpq.train.evaluate import evaluating

BATCH = 64
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Wanted:
    """What is read of data given as values.

    Args:
        count: to work on; None: all there are.
        held_out: further ones to measure on, where there are no data for that.
        seed: of the choice among the items of a `Dataset`.
    """

    count: int | None = 512
    held_out: int = 500
    seed: int = 0


def called(model: nn.Module, batch: Any) -> Network | None:
    """How a network is called with a batch; None where it takes one batch of images.

    Arguments are found by name in a dict, and in order in a tuple: as many as have no default.
    What goes by the name of labels is an argument only where it must be one.

    Raises:
        GraphError: the batch does not fit the signature.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    known = {p.name: p.default is p.empty for p in parameters if p.kind not in _VARIADIC}
    needed = [name for name, required in known.items() if required]
    if isinstance(batch, list | tuple) and batch and isinstance(batch[0], Mapping | list | tuple):
        batch = batch[0] if isinstance(batch[0], Mapping) else tuple(batch[0])
    if isinstance(batch, Mapping):
        wanted = [n for n in known if n in batch and (known[n] or n not in LABELS)]
        if not wanted:
            return None  # the only input by one of the usual names
        arguments = {name: batch[name] for name in wanted if holds_tensor(batch[name])}
    else:
        values = batch if isinstance(batch, list | tuple) else (batch,)
        arguments = dict(zip(needed or list(known)[:1], values, strict=False))
    lone = next(iter(arguments.values()), None)
    images = isinstance(lone, Tensor) and lone.ndim == 4 and lone.is_floating_point()
    if len(arguments) < 2 and (images or not holds_tensor(lone)) and len(needed) < 2:
        return None
    return Network(model, (), arguments).map(lambda t: t.detach().cpu())


def peeked(data: Any, seed: int) -> tuple[Any, Any]:
    """The first batch, and data that begin with it; of a `Dataset` the first items."""
    if isinstance(data, Tensor | Dataset) or not isinstance(data, Iterator):
        return next(iter(batches_of(data, None if _streams(data) else BATCH, seed)), None), data
    first = next(data, None)
    return first, data if first is None else chain([first], data)


def of_any(
    call: Network, info: ModelInfo | None, data: Any, validation: Any, wanted: Wanted
) -> Subject:
    """A network that takes anything, with its data as arrays by name."""
    if info is None:
        answer = _answer(call)
        info = ModelInfo(
            arch=type(call.module).__name__,
            sha256=weights_hash(call.module.state_dict()),
            classes=answer.shape[1] if isinstance(answer, Tensor) and answer.ndim > 1 else 1,
            inputs=call.specs,
        )
    found = None
    if data is not None and not isinstance(data, str | Path):
        found = _inputs(call, data, validation, wanted, info.classes)
    return Subject(call.module, info, found, GIVEN, NAMED["none"], call=call)


def _answer(call: Network) -> Any:
    """What a network answers to its example.

    Raises:
        DataError: it fails.
    """
    try:
        with evaluating(call.module):
            return call.module(*call.args, **call.kwargs)
    except Exception as error:
        got = ", ".join(f"{t.dtype} {list(t.shape)}" for t in leaves(call.example).values())
        raise DataError(
            "a batch must begin with what the network takes, such as images [N, C, H, W] of "
            f"floats, but it fails: {str(error).partition(chr(10))[0]}. Got {got}."
        ) from error


def _inputs(call: Network, data: Any, validation: Any, wanted: Wanted, classes: int) -> DataSet:
    """What was read, as the stages take it."""
    takes, count = call.specs, wanted.count
    if validation is not None:
        splits = [gather_inputs(data, takes, count, wanted.seed),
                  gather_inputs(validation, takes, wanted.held_out, wanted.seed)]  # fmt: skip
    else:
        both = None if count is None else count + wanted.held_out
        inputs, labels = gather_inputs(data, takes, both, wanted.seed)
        cut = count or round(0.9 * _length(inputs)) or 1
        splits = [_cut(inputs, labels, slice(cut)), _cut(inputs, labels, slice(cut, None))]
    known = [ids for _, ids in splits if ids is not None and (ids >= 0).all()]
    labelled = classes > 1 and len(known) == len(splits)
    train, measured = (
        InputSplit(inputs, np.zeros(_length(inputs), np.int64) if ids is None else ids)
        for inputs, ids in splits
    )
    names = tuple(map(str, range(classes))) if labelled else ()
    return DataSet(GIVEN, names, train, measured, measured, (1, 1), pixels=False)


def _length(inputs: Mapping[str, NDArray[Any]]) -> int:
    return len(next(iter(inputs.values())))


def _cut(inputs: Mapping[str, NDArray[Any]], labels: Any, part: slice) -> Named:
    return {n: array[part] for n, array in inputs.items()}, None if labels is None else labels[part]


def gather_inputs(data: Any, takes: InputSpecs, count: int | None, seed: int) -> Named:
    """As `gather`, for a network that takes anything: arrays by name of input.

    Raises:
        DataError: no items, or none that the network takes.
    """
    batches, found = [], 0
    for number, batch in enumerate(batches_of(data, count, seed)):
        inputs, labels = parts(batch, takes, f"batch {number}")
        named = {n: fitting(x, takes.get(n), n, f"batch {number}") for n, x in inputs.items()}
        batches.append((named, labels))
        found += _length(named)
        if count is not None and found >= count:
            break
    return _cut(*joined(batches, "the data"), slice(count))


def _streams(data: Any) -> bool:
    return isinstance(getattr(data, "dataset", data), IterableDataset)


def _sampled(batches: Iterable[Any], wanted: int, seed: int) -> Iterator[Any]:
    """Batches of a sample of a stream."""
    samples = (
        pytree.tree_map_only(Tensor, Tensor.clone, rows(batch, slice(at, at + 1), total))
        for batch in batches
        for total in [length_of(inputs_of(batch))]
        for at in range(total)
    )
    kept = reservoir(samples, wanted, seed)
    return (together(kept[at : at + BATCH]) for at in range(0, len(kept), BATCH))


def batches_of(data: Any, count: int | None, seed: int) -> Iterator[Any]:
    """Batches of data in any form; so many items of a `Dataset` or a stream are a sample of it."""
    if isinstance(data, Tensor):
        return iter([data])
    if _streams(data):
        loader = DataLoader(data, batch_size=BATCH) if isinstance(data, IterableDataset) else data
        return each(loader) if count is None else _sampled(each(loader), count, seed)
    if isinstance(data, Dataset):
        total = len(data)  # type: ignore[arg-type]
        order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
        picked = order if count is None else order[:count]
        chunks = (picked[i : i + BATCH] for i in range(0, len(picked), BATCH))
        return each(default_collate([data[i] for i in chunk]) for chunk in chunks)
    if isinstance(data, Iterable):
        return each(data)
    raise DataError(
        "data must be a DataLoader, a Dataset, an iterable of batches, a tensor, or a name as "
        f"--data takes it. Got {type(data).__name__}."
    )
