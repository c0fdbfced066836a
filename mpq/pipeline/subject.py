"""What a stage works on: a trained network, how its images are normalized, and its data."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq import zoo
from mpq.capture.network import Network
from mpq.checkpoint import Loaded, Reading, open_model
from mpq.data import (
    DataSet,
    DataSource,
    Normalization,
    load_arrays,
    open_data,
    sample_indices,
)
from mpq.data.dataset import Split
from mpq.data.normalize import NAMED
from mpq.errors import CheckpointError, DataError, PolicyError
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float
from mpq.pipeline.measuring import Batches, Judging
from mpq.pipeline.proposing import propose_normalization
from mpq.policy import ModelInfo, Policy
from mpq.train.evaluate import predict
from mpq.trusted import is_name
from mpq.zoo.whole import is_whole

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
    anything but one batch of images. `judging` is how answers are judged, where top-1 will not do,
    and `batches` are the user's own, to learn from by a loss of theirs.

    Raises:
        DataError: the network does not take images of three channels, and there are data.
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

    def __post_init__(self) -> None:
        if self.data is not None and self.call is not None:
            raise DataError(
                f"{self.info.arch} must take one batch of images to be given {self.data_name}. Its "
                f"example call has {list(self.call.inputs)}. Give --data none."
            )
        if self.data is not None and self.data_name != GIVEN and self.info.input[0] != 3:
            raise DataError(
                f"{self.info.arch} must take images of 3 channels, as {self.data_name} has. It "
                f"takes {self.info.input[0]}. Give --data none, or a factory whose network takes "
                "RGB and converts it in its first step (`x.mean(1, keepdim=True)` for grey)."
            )

    def graph(self) -> QuantGraph:
        """The float graph.

        Raises:
            GraphError: the network cannot be traced.
        """
        return to_float(self.module, self.call or torch.zeros(2, *self.info.input))

    def require_data(self, purpose: str) -> DataSet:
        """The data set.

        Raises:
            DataError: there is none.
        """
        if self.data is None:
            raise DataError(
                f"{purpose} needs images, but --data is none. Name a data set with --data: "
                "digits, cifar10, cifar100, a folder, a zip, or module:factory."
            )
        return self.data

    def held_out(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]] | None:
        """Images and labels to choose by, or None where training takes all there are.

        Raises:
            DataError: there are no data.
        """
        split = self.require_data("validation").validation
        return self.arrays(split) if len(split) else None

    def learned(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images and labels to train on; -1 where there is no label.

        Raises:
            DataError: there are no data.
        """
        images, labels = self.arrays(self.require_data("training").train)
        if self.unlabelled is None:
            return images, labels
        more, _ = load_arrays(self.unlabelled)
        return np.concatenate([images, more]), np.concatenate([labels, np.full(len(more), -1)])

    def arrays(self, split: Split) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All images and labels of a split of the data."""
        images, labels = load_arrays(split)
        return images, self._labels(images, labels)

    def read(
        self, split: Split, picked: NDArray[np.int64]
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Some images and labels of a split of the data."""
        images = split.read(picked)
        return images, self._labels(images, split.labels[picked])

    def _labels(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.int64]:
        if self.data is None or self.data.labelled:
            return labels
        answered: NDArray[np.int64] = predict(self.module, images, self.normalize).argmax(1).numpy()
        return answered

    def sample(self, count: int, seed: int, purpose: str) -> Tensor:
        """A seeded sample of the training split, normalized `[count, C, H, W]`.

        Raises:
            DataError: there are no data.
        """
        train = self.require_data(purpose).train
        return self.tensor(train.read(sample_indices(train, count, seed)))

    def labelled(self, split: Split, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """A seeded sample of a split: normalized `[count, C, H, W]`, and labels `[count]`."""
        images, labels = self.read(split, sample_indices(split, count, seed))
        return self.tensor(images), torch.from_numpy(labels)

    def tensor(self, images: NDArray[np.uint8]) -> Tensor:
        """Normalized float images `[N, C, H, W]` of uint8 `[N, H, W, C]`."""
        return torch.from_numpy(self.normalize.apply(images))


def open_checkpoint(
    path: Path,
    source: DataSource,
    *,
    arch: str | None = None,
    weights: str | None = None,
    normalize: Normalization | None = None,
    trust_pickle: bool = False,
    input_shape: tuple[int, ...] | None = None,
) -> Subject:
    """Open a checkpoint with its data.

    Args:
        path: as of `mpq.checkpoint.load_model`.
        source: the data.
        arch: the architecture; None: what the weights fit.
        weights: which of several in the file, as `mpq.checkpoint.Reading`.
        normalize: how images are normalized; None: as the file says, else what is proposed.
        trust_pickle: run the code inside the file if it has some.
        input_shape: `(C, H, W)` or `(H, W)` of the images; None: what the network is meant for.

    Raises:
        CheckpointError: the file cannot be read or matched.
        DataError: no data are named, or they do not fit the network.
        UsageError: the normalization is neither known nor can be proposed.
    """
    reading = Reading(arch, None, weights, input_shape, trust_pickle)
    return subject_of(open_model(path, reading), path, source, normalize=normalize)


def subject_of(
    loaded: Loaded,
    path: Path,
    source: DataSource,
    *,
    normalize: Normalization | None = None,
) -> Subject:
    """What was read from a checkpoint, with its data. Raises as `open_checkpoint`."""
    name = source.data or loaded.data
    if not name:
        raise DataError(
            f"{path} does not say which data it was trained on. Name them with --data (digits, "
            "cifar10, cifar100, a folder, a zip, module:factory), or analyze without data by "
            "--data none: scores are then the SQNR of the weights alone."
        )
    info = loaded.info
    data = _data(name, source, info)
    _tell_unlabelled(data, name)
    if info.checkpoint:
        info = info.replace(checkpoint=os.path.relpath(path))
    more = source.more(info.input[1:])
    subject = Subject(loaded.module, info, data, name, _NEUTRAL, more, loaded.call)
    return normalized(subject, normalize)


def normalized(subject: Subject, normalize: Normalization | None) -> Subject:
    """Settle the normalization: as given, else as known, else as proposed where there are data."""
    if normalize is None and subject.info.normalize:
        normalize = Normalization.parse(subject.info.normalize)
    if normalize is None:
        if subject.data is None:
            return subject  # it stays unknown until data are there to propose it
        normalize = propose_normalization(subject.module, subject.info, subject.data)
    info = subject.info.replace(normalize=str(normalize))
    return replace(subject, normalize=normalize, info=info)


def _data(name: str, source: DataSource, info: ModelInfo) -> DataSet | None:
    if name == "none":
        return None
    data = open_data(name, root=source.root, size=info.input[1:], holdout=source.holdout)
    if data.labelled:
        data.require_classes(info.classes)
    return data


def _tell_unlabelled(data: DataSet | None, name: str) -> None:
    if data is not None and not data.labelled:
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
    info = policy.model
    if info is None:
        raise PolicyError(
            f"{where} must name the model that it is for (key `model`). `mpq analyze` writes it."
        )
    name = source.data or policy.data.name
    if module is not None and not weights:
        loaded = Loaded(module, info)
    else:
        load = _load_weights if weights else _load_architecture
        loaded = load(info, where, trust_pickle)
    data, more = _data(name, source, info), source.more(info.input[1:])
    subject = Subject(loaded.module, info, data, name, _NEUTRAL, more, loaded.call)
    if weights:
        _tell_unlabelled(subject.data, name)
    return normalized(subject, None) if weights or info.normalize else subject


def settle(policy: Policy, subject: Subject) -> Policy:
    """A policy that names the data and the normalization that were in fact used."""
    data = policy.data.replace(name=subject.data_name)
    return policy.replace(model=subject.info, data=data)


def find_checkpoint(info: ModelInfo, policy_path: Path) -> Path:
    """Where a policy's checkpoint lies: seen from here, from the policy, or from above it.

    Raises:
        PolicyError: the policy names none.
        CheckpointError: it is in none of these places.
    """
    if not info.checkpoint:
        raise PolicyError(f"{policy_path} must name its checkpoint (key `model.checkpoint`).")
    # A policy in runs/NAME names its checkpoint as seen from the folder above runs.
    places = [Path(), *policy_path.absolute().parents]
    found = next((p / info.checkpoint for p in places if (p / info.checkpoint).exists()), None)
    if found is None:
        raise CheckpointError(
            f"the checkpoint {info.checkpoint} that {policy_path} was made for does not exist "
            f"(looked in the working directory, {policy_path.parent} and above). Put it there, or "
            "edit model.checkpoint."
        )
    return found


def _load_weights(info: ModelInfo, policy_path: Path, trust_pickle: bool) -> Loaded:
    brought = not info.checkpoint and is_name(info.arch)
    found = Path(info.arch) if brought else find_checkpoint(info, policy_path)
    arch = None if brought else info.arch
    reading = Reading(arch, info.classes, info.weights, info.input, trust_pickle)
    loaded = open_model(found, reading)
    digest = loaded.info.sha256
    if info.sha256 and digest != info.sha256:
        raise PolicyError(
            f"{policy_path} was made for other weights than those in {found}: sha256 must be "
            f"{info.sha256[:12]}..., got {digest[:12]}.... Run `mpq analyze {found}` again, or "
            "remove model.sha256 from the policy to use it all the same."
        )
    return loaded


def _load_architecture(info: ModelInfo, policy_path: Path, trust_pickle: bool) -> Loaded:
    """The network that a policy was made for; its weights are of no account."""
    if info.checkpoint:
        try:
            found = find_checkpoint(info, policy_path)
        except CheckpointError:
            found = None  # what has a name can be built without it
        if found and (is_whole(found) or trust_pickle):
            reading = Reading(info.arch, None, info.weights, info.input, trust_pickle)
            return open_model(found, reading)
    return Loaded(zoo.build(info.arch, info.classes, in_channels=info.input[0]), info)
