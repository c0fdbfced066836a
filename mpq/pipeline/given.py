"""What a stage works on, given as values: a network, and data in any form that PyTorch users have.

Data may be what `--data` names, a `DataSet`, a torch `DataLoader`, a `Dataset`, an iterable of
batches, or a tensor. A batch is a tensor, a tuple that begins with what the network takes, or a
dict of it; class ids that come with it are labels, anything else is not looked at. What is needed
is read once and kept in memory, as the network takes it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mpq.calls import Inputs
from mpq.capture.network import check_module
from mpq.checkpoint import load_model, weights_hash
from mpq.data import DataSet, DataSource, Normalization, open_data
from mpq.data.batches import INPUTS, LABELS
from mpq.data.dataset import ArraySplit
from mpq.data.normalize import NAMED
from mpq.errors import DataError, UsageError
from mpq.pipeline.anything import BATCH, Wanted, batches_of, called, of_any, peeked
from mpq.pipeline.measuring import Batches, judging_of, opened
from mpq.pipeline.subject import GIVEN, Subject, normalized, open_checkpoint
from mpq.pipeline.wishes import Wishes
from mpq.policy import ModelInfo
from mpq.train.evaluate import evaluating
from mpq.zoo.libraries import declared_input, declared_pictures

Data = str | Path | DataSet | Tensor | Dataset[Any] | Iterable[Any]


def given(
    model: nn.Module | str | Path,
    data: Data | None,
    wanted: Wanted,
    *,
    validation: Data | None = None,
    normalize: str = "",
    example: Inputs | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Subject:
    """A network and its data as a stage takes them.

    Args:
        model: a trained network, or its checkpoint.
        data: None: no images are looked at.
        wanted: how many images.
        validation: what is measured on. None: items of `data` that are not worked on.
        normalize: what has been done to the images, as `--normalize`; images by name are normalized
            so. Empty: unknown.
        example: a batch `[N, C, H, W]`, or inputs (`mpq.calls`), needed without data.
        outputs: kinds of outputs by name; of others the kind is proposed.

    Raises:
        DataError: data of another form, or none where an example is needed.
        CheckpointError: a checkpoint that cannot be read.
        GraphError: an example that does not fit the network's signature.
    """
    found = _given(model, data, wanted, validation=validation, normalize=normalize, example=example)
    return replace(found, outputs=dict(outputs or {}))


def _given(
    model: nn.Module | str | Path,
    data: Data | None,
    wanted: Wanted,
    *,
    validation: Data | None,
    normalize: str,
    example: Inputs | None,
) -> Subject:
    info, call = None, None
    if isinstance(model, nn.Module):
        check_module(model)
    elif not isinstance(model, str | Path):
        raise UsageError(
            "model must be a network (nn.Module) or the path of a checkpoint. Got "
            f"{type(model).__name__}. A state dict needs its network: net.load_state_dict(...)."
        )
    else:
        if data is None or isinstance(data, str | Path):
            how = Normalization.parse(normalize) if normalize else None
            named = None if data is None else str(data)
            return open_checkpoint(Path(model), DataSource(named), normalize=how)
        loaded, checkpoint = load_model(Path(model)), os.path.relpath(model)
        model, info = loaded.module, loaded.info.replace(checkpoint=checkpoint)
        call = loaded.call
    if isinstance(data, str | Path | DataSet) and str(data) != "none":
        return _named(model, info, data, normalize)
    if data is not None and not isinstance(data, str | Path):
        first, data = peeked(data, wanted.seed)
        first = first if example is None else example
        call = call or (None if first is None else called(model, first))
    elif example is not None:
        call = call or called(model, example)
    if call is not None:
        return of_any(call, info, data, validation, wanted)
    assert example is None or isinstance(example, Tensor)
    read = None
    if data is not None and not isinstance(data, str | Path):
        read = _read(data, validation, wanted)
        example = torch.from_numpy(read.train[0][:2]).permute(0, 3, 1, 2)
    if example is None and info is None:
        raise DataError("without data a batch must be given: example=torch.zeros(1, C, H, W).")
    if info is None:
        assert example is not None
        info = _info(model, example, normalize)
    found = read.data_set(info.classes) if read else None
    return Subject(model, info, found, GIVEN, NAMED["none"])


def judged(
    subject: Subject,
    wishes: Wishes,
    data: Any = None,
    validation: Any = None,
    *,
    learn: bool = False,
) -> Subject:
    """A subject with the metric that is asked for, and with batches to learn from as they come.

    Args:
        subject: as `given` made it.
        wishes: the metric.
        data: what it was made from.
        validation: likewise.
        learn: whether a loss of the user's own is to see the batches of `data`.
    """
    judging = judging_of(wishes, as_batches(validation))
    train = as_batches(data) if learn else None
    batches = None if train is None else Batches(train, as_batches(validation))
    return replace(subject, judging=judging, batches=batches)


def with_wishes(subject: Subject, wishes: Wishes, wanted: Wanted) -> Subject:
    """A subject of the command line with its metric and its batches.

    Where no data are named, the batches are also what is calibrated and scored on.
    """
    batches = opened(wishes)
    judging = judging_of(wishes, batches.validation if batches else None)
    subject = replace(subject, judging=judging, batches=batches)
    if batches is None or subject.data is not None:
        return subject
    read = _read(batches.train, batches.validation, wanted)
    _, height, width, channels = read.train[0].shape
    info = subject.info.replace(input=(channels, height, width))
    return replace(subject, info=info, data=read.data_set(info.classes), data_name=GIVEN)


def as_batches(data: Any) -> Iterable[Any] | None:
    """Data given as values, as batches in their own structure; None of data by name."""
    if data is None or isinstance(data, str | Path | DataSet):
        return None
    if isinstance(data, Tensor):
        return list(data.split(BATCH))
    if isinstance(data, Dataset):
        return DataLoader(data, batch_size=BATCH)
    found: Iterable[Any] = data
    return found


def _named(
    model: nn.Module, info: ModelInfo | None, data: str | Path | DataSet, normalize: str
) -> Subject:
    """Data by name, or opened already: normalized as asked, or as the network is found to want."""
    declared, pictures = declared_pictures(model)
    size = info.input[1:] if info else (declared_input(model) or (None,))[1:] or None
    found = data if isinstance(data, DataSet) else open_data(data, size=size, pictures=pictures)
    info = info or _info(model, torch.zeros(1, 3, *found.size), declared, pictures)
    if found.labelled:
        found.require_classes(info.classes)
    how = Normalization.parse(normalize) if normalize else None
    return normalized(Subject(model, info, found, found.name, NAMED["none"]), how)


def _info(
    model: nn.Module, example: Tensor, normalize: str, pictures: str | None = None
) -> ModelInfo:
    """What a policy says of a network that came as a value."""
    with evaluating(model):
        answer = model(example[:1].to(next((p.device for p in model.parameters()), "cpu")))
    classes = answer.shape[1] if isinstance(answer, Tensor) and answer.ndim > 1 else 1
    return ModelInfo(
        arch=type(model).__name__,
        sha256=weights_hash(model.state_dict()),
        classes=classes,
        input=(example.shape[1], example.shape[2], example.shape[3]),
        normalize=str(Normalization.parse(normalize)) if normalize else "",
        pictures=pictures,
    )


Arrays = tuple[NDArray[Any], NDArray[np.int64]]
"""Images `[n, H, W, C]` as the network takes them, and class ids `[n]`, -1 where there are none."""


@dataclass(frozen=True)
class _Read:
    """What was read: to work on, and to measure on."""

    train: Arrays
    measured: Arrays
    split_off: bool = False

    def data_set(self, classes: int) -> DataSet:
        """As the stages take it; without labels unless all images have one."""
        both = (self.train, self.measured)
        labelled = classes > 1 and all((labels >= 0).all() for _, labels in both)
        size = self.train[0].shape[1], self.train[0].shape[2]
        train, measured = (ArraySplit(*arrays, size) for arrays in both)
        names = tuple(map(str, range(classes))) if labelled else ()
        return DataSet(GIVEN, names, train, measured, measured, size, split_off=self.split_off)


def _read(data: Any, validation: Any, wanted: Wanted) -> _Read:
    if validation is not None:
        train = gather(data, wanted.count, wanted.seed)
        return _Read(train, gather(validation, wanted.held_out, wanted.seed))
    both = None if wanted.count is None else wanted.count + wanted.held_out
    images, labels = gather(data, both, wanted.seed)
    cut = wanted.count or round(0.9 * len(images)) or 1
    return _Read((images[:cut], labels[:cut]), (images[cut:], labels[cut:]), split_off=True)


def gather(data: Any, count: int | None, seed: int) -> Arrays:
    """The first `count` items; of a `Dataset`, which has no order of its own, some of all.

    Raises:
        DataError: no items, or no images `[N, C, H, W]` of floats.
    """
    images, labels, found = [], [], 0
    for batch in batches_of(data, count, seed):
        one, of = _parts(batch)
        images.append(one)
        labels.append(of)
        found += len(one)
        if count is not None and found >= count:
            break
    if not found:
        raise DataError(
            "data must give at least one image. Got none; an iterator can be read only once, so "
            "give a DataLoader, a list of batches or a tensor."
        )
    planes = torch.cat(images)[:count].permute(0, 2, 3, 1)
    return np.ascontiguousarray(planes.numpy(), np.float32), torch.cat(labels)[:count].numpy()


def _parts(batch: Any) -> tuple[Tensor, Tensor]:
    """Images and class ids of a batch; -1 where it says none."""
    if isinstance(batch, Mapping):
        images = next((batch[key] for key in INPUTS if key in batch), None)
        labels = next((batch[key] for key in LABELS if key in batch), None)
    elif isinstance(batch, tuple | list):
        images, labels = (*batch, None, None)[:2]
    else:
        images, labels = batch, None
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else None
        keys = f" with keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        raise DataError(
            "a batch must begin with images [N, C, H, W] of floats, as the network takes them, or "
            f"be a dict that has them under {', '.join(INPUTS)}. Got "
            f"{got or type(batch).__name__ + keys}."
        )
    known = isinstance(labels, Tensor) and labels.shape == images.shape[:1]
    if isinstance(labels, Tensor) and known and not labels.is_floating_point():
        return images.detach().cpu(), labels.detach().cpu().long()
    return images.detach().cpu(), torch.full(images.shape[:1], -1)
