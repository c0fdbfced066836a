"""What a stage works on: a trained network, how its images are normalized, and its data."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.calls import Inputs
from mpq.capture.network import Network
from mpq.checkpoint import Loaded, Reading, open_model
from mpq.data import DataSet, DataSource, Normalization, load_arrays, open_data, sample_indices
from mpq.data.cache import joined
from mpq.data.dataset import Labels, Samples, Split
from mpq.data.normalize import NAMED
from mpq.errors import DataError
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import as_places
from mpq.graph.passes import to_float
from mpq.pipeline.loading import example_call, load_architecture, load_weights, named
from mpq.pipeline.measuring import Batches, Judging
from mpq.pipeline.proposing import propose_normalization
from mpq.pipeline.samples import as_inputs, logits_of
from mpq.policy import ModelInfo, Policy
from mpq.train.evaluate import accuracy, predict, top1

logger = logging.getLogger(__name__)
_NEUTRAL = NAMED["none"]
GIVEN = "none"
"""The name of data that were given as values (`mpq.pipeline.given`): nobody can open them again."""


@dataclass(frozen=True)
class Subject:
    """A network and its data; `data` is None for a data-free analysis.

    Where the images of `data` have no labels, what the network itself answers stands in for them:
    accuracy is then agreement with the network before it was changed. `unlabelled` are more images
    to train on, of which only teachers speak. `call` is an example call, of a network that takes
    anything but one batch of images; its data are arrays by name of input. `outputs` are the kinds
    of outputs that were given by name (`mpq.outputs`); others are proposed. `judging`
    is how answers are judged, where top-1 will not do, and `batches` are the user's own, to learn
    from by a loss of theirs. `trained_on` names the data whose held-out images it was trained
    without; empty: nobody knows.

    Raises:
        DataError: images, of a network that takes something else.
    """

    module: nn.Module
    info: ModelInfo
    data: DataSet | None
    data_name: str
    normalize: Normalization
    unlabelled: Split | None = None
    call: Network | None = None
    judging: Judging | None = None
    batches: Batches | None = None
    outputs: Mapping[str, str] = field(default_factory=dict)
    trained_on: str = ""

    def __post_init__(self) -> None:
        if self.data is not None and self.data.pixels and self.call is not None:
            raise DataError(
                f"{self.info.arch} must take one batch of images to be given {self.data_name}. It "
                f"takes {', '.join(self.call.specs)}. Give a .npz file with an array for each, a "
                "module:factory of such batches, or --data noise."
            )

    def graph(self) -> QuantGraph:
        """The float graph.

        Raises:
            GraphError: the network cannot be traced.
            UsageError: an output or a kind that there is not.
        """
        example = self.call or torch.zeros(2, *self.info.input)
        graph = to_float(self.module, example, self.outputs)
        if self.judging is not None and self.judging.metric.places:
            graph.outputs = dict(as_places(graph.outputs))
        return graph

    @property
    def seen(self) -> bool:
        """Whether the network may have been trained on the images that are held out of `data`."""
        data = self.data
        return data is not None and data.split_off and self.trained_on != self.data_name

    def require_data(self, purpose: str) -> DataSet:
        """The data set.

        Raises:
            DataError: there is none.
        """
        if self.data is None:
            raise DataError(
                f"{purpose} needs images, but --data is none. Name a data set with --data: "
                "digits, cifar10, cifar100, a folder, a zip, a .npz, module:factory, or noise; or "
                "batches with --batches, where the command has it."
            )
        return self.data

    def held_out(self) -> tuple[Samples, Labels] | None:
        """Images and labels to choose by, or None where training takes all there are.

        Raises:
            DataError: there are no data.
        """
        split = self.require_data("validation").validation
        return self.arrays(split) if len(split) else None

    def learned(self, *, in_files: bool = False) -> tuple[Samples, Labels]:
        """Images and labels to train on; -1 where there is no label.

        `in_files` asks for a stream of them, where they lie in files.

        Raises:
            DataError: there are no data.
        """
        train = self.require_data("training").train
        found = self.arrays(train, in_files=in_files)
        return found if self.unlabelled is None else joined(found, self.unlabelled)

    def arrays(self, split: Split, *, in_files: bool = False) -> tuple[Samples, Labels]:
        """All images and labels of a split of the data, as `load_arrays` gives them."""
        images, labels = load_arrays(split, in_files=in_files)
        return images, self._labels(images, labels)

    def read(self, split: Split, picked: NDArray[np.int64]) -> tuple[Samples, Labels]:
        """Some images and labels of a split of the data."""
        images = split.read(picked)
        return images, self._labels(images, split.labels[picked])

    def _labels(self, images: Samples, labels: Labels) -> Labels:
        if self.data is None or self.data.labelled:
            return labels
        if not isinstance(images, Mapping):
            logits = predict(self.module, images, self.normalize)
        else:
            logits = logits_of(self.module, self.tensor(images), self.call)
        answered: Labels = logits.argmax(1).numpy()
        return answered

    def top1(self, module: nn.Module, images: Samples, labels: Labels) -> float:
        """Percent of samples, as `read` gives them, that a module puts into their class.

        Raises:
            DataError: it is no classifier.
        """
        if not isinstance(images, Mapping):
            return accuracy(module, images, labels, self.normalize)
        return top1(logits_of(module, self.tensor(images), self.call), labels)

    def sample(self, count: int, seed: int, purpose: str) -> Inputs:
        """A seeded sample of the training split, as `tensor` gives it.

        Raises:
            DataError: there are no data.
        """
        train = self.require_data(purpose).train
        return self.tensor(train.read(sample_indices(train, count, seed)))

    def labelled(self, split: Split, count: int, seed: int) -> tuple[Inputs, Tensor]:
        """A seeded sample of a split, as `tensor` gives it, and labels `[count]`."""
        images, labels = self.read(split, sample_indices(split, count, seed))
        return self.tensor(images), torch.from_numpy(labels)

    def tensor(self, images: Samples) -> Inputs:
        """Inputs as the network takes them: images normalized `[N, C, H, W]`, others as is."""
        return as_inputs(images, self.normalize, self.call)


def open_checkpoint(
    path: Path,
    source: DataSource,
    *,
    reading: Reading | None = None,
    normalize: Normalization | None = None,
    outputs: Mapping[str, str] | None = None,
) -> Subject:
    """Open a checkpoint with its data.

    Args:
        path: as of `mpq.checkpoint.load_model`.
        source: the data.
        reading: how the file is read; None: as it says itself.
        normalize: how images are normalized; None: as the file says, else what is proposed.
        outputs: kinds of outputs by name; of others the kind is proposed.

    Raises:
        CheckpointError: the file cannot be read or matched.
        DataError: no data are named, or they do not fit the network.
        UsageError: the normalization is neither known nor can be proposed.
    """
    found = subject_of(open_model(path, reading or Reading()), path, source, normalize=normalize)
    return replace(found, outputs=dict(outputs or {}))


def subject_of(
    loaded: Loaded, path: Path, source: DataSource, *, normalize: Normalization | None = None
) -> Subject:
    """What was read from a checkpoint, with its data. Raises as `open_checkpoint`."""
    name = source.data or loaded.data or ("noise" if loaded.call else "")
    if not name:
        raise DataError(
            f"{path} does not say which data it was trained on. Name them with --data (digits, "
            "cifar10, cifar100, a folder, a zip, module:factory), or analyze without data by "
            "--data none: scores are then the SQNR of the weights alone."
        )
    info = loaded.info
    tell_pictures(info, normalize)
    data = _data(name, source, loaded)
    _tell_unlabelled(data, name)
    if info.checkpoint:
        info = info.replace(checkpoint=os.path.relpath(path))
    more = source.more(info.input, info.pictures)
    subject = Subject(
        loaded.module, info, data, name, _NEUTRAL, more, loaded.call, trained_on=loaded.data or ""
    )
    subject = normalized(subject, normalize)
    if data is not None and not data.pixels and subject.info.normalize not in ("", "none"):
        logger.warning(
            "data %s are floats, taken as normalized (%s) already; uint8 pixels are normalized "
            "here", name, subject.info.normalize,
        )  # fmt: skip
    return subject


def normalized(subject: Subject, normalize: Normalization | None) -> Subject:
    """Settle the normalization: as given, else as known, else as proposed where there are data."""
    if normalize is None and subject.info.normalize:
        normalize = Normalization.parse(subject.info.normalize)
    if normalize is None:
        if subject.data is None or not subject.data.pixels:
            return subject  # it stays unknown until data are there to propose it
        normalize = propose_normalization(subject.module, subject.info, subject.data)
    info = subject.info.replace(normalize=str(normalize))
    return replace(subject, normalize=normalize, info=info)


def tell_pictures(info: ModelInfo, normalize: Normalization | None = None) -> None:
    """Say how images are prepared where a network of timm configures it."""
    if info.pictures:
        size = "x".join(map(str, info.input))
        logger.warning(
            "pictures are prepared as %s configures itself: %s, fitted by %s, normalization %s",
            info.arch, size, info.pictures, normalize or info.normalize or "unknown",
        )  # fmt: skip


def _data(name: str, source: DataSource, loaded: Loaded) -> DataSet | None:
    if name == "none":
        return None
    info, takes = loaded.info, None if loaded.call is None else loaded.call.specs
    data = open_data(
        name,
        root=source.root,
        size=info.input,
        holdout=source.holdout,
        takes=takes,
        pictures=info.pictures,
    )
    if data.labelled and not data.pixels:  # what classes arrays lack is not known
        names = tuple(map(str, range(max(info.classes, len(data.classes)))))
        data = replace(data, classes=names)
    if data.labelled:
        data.require_classes(info.classes)
    return data


def _tell_unlabelled(data: DataSet | None, name: str) -> None:
    if name == "noise":
        logger.warning("there are no data: ranges and scores are those of noise, which is rough")
    elif data is not None and not data.labelled:
        logger.warning(
            "data %s have no labels: right is what the network answers before it is quantized", name
        )


def policy_subject(
    policy: Policy,
    where: Path,
    source: DataSource,
    *,
    weights: bool,
    trust_pickle: bool = False,
    module: nn.Module | None = None,
) -> Subject:
    """The network and data that a policy names.

    Args:
        policy: the policy.
        where: the file it came from, for messages and for relative paths.
        source: overrides for the data.
        weights: load the checkpoint and check its hash; otherwise only build the architecture.
        trust_pickle: load a checkpoint that can run code.
        module: the architecture, where it is at hand.

    Raises:
        PolicyError: the policy names no model, or was made for other weights.
        CheckpointError: the checkpoint is missing or unreadable.
        DataError: the data do not fit.
    """
    info = named(policy, where)
    if module is not None and not weights:
        loaded = Loaded(module, info, call=example_call(module, info))
    else:
        load = load_weights if weights else load_architecture
        loaded = load(info, where, trust_pickle)
    name = source.data or policy.data.name
    if loaded.call is not None and not source.data and name == "none":
        name = "noise"
    data, more = _data(name, source, loaded), source.more(info.input, info.pictures)
    subject = Subject(
        loaded.module,
        info,
        data,
        name,
        _NEUTRAL,
        more,
        loaded.call,
        outputs=dict(policy.outputs),
        trained_on=loaded.data or "",
    )
    if weights:
        _tell_unlabelled(subject.data, name)
    return normalized(subject, None) if weights or info.normalize else subject


def settle(policy: Policy, subject: Subject) -> Policy:
    """A policy that names the data and the normalization that were in fact used."""
    data = policy.data.replace(name=subject.data_name)
    return policy.replace(model=subject.info, data=data)
