"""What a split and a data set are, and the splits that need no files: arrays, noise, subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpq.data.images import fit_array
from mpq.errors import DataError
from mpq.inputs import InputSpecs

Images = NDArray[np.uint8]
"""Images `[n, H, W, C]`, 0..255. Data given as values may be floats instead."""
Samples: TypeAlias = Any
"""`Images`; or, of a network that takes anything else, arrays `[n, ...]` by name of input."""
Labels = NDArray[np.int64]
"""Class ids `[n]`, 0..classes-1."""
Indices = Sequence[int] | NDArray[Any]


def length(samples: Samples) -> int:
    """How many samples there are."""
    return len(next(iter(samples.values())) if isinstance(samples, Mapping) else samples)


def rows(samples: Samples, part: slice) -> Samples:
    """Some of the samples."""
    if isinstance(samples, Mapping):
        return {name: array[part] for name, array in samples.items()}
    return samples[part]


class Split(Protocol):
    """A labelled split that decodes only the images (or other samples) it is asked for."""

    @property
    def labels(self) -> Labels:
        """Class ids `[n]`, known without decoding."""

    def __len__(self) -> int: ...

    def read(self, indices: Indices) -> Samples:
        """The images of these indices, `[len(indices), H, W, C]`, in the order asked for."""


@dataclass(frozen=True)
class DataSet:
    """Three splits of one set of classes, or of images without labels.

    Args:
        name: as given to `open_data`, so that a policy can name it again.
        classes: class names; a label is an index into them. None at all: the images have no
            labels, and what `labels` say means nothing.
        train: images to fit on, without those of `validation`.
        validation: images to choose by; may be empty.
        test: images to report on; empty where there are very few.
        size: height and width of every image.
        pixels: whether they are images, to be normalized; else arrays by name of input, as the
            network takes them, and `size` means nothing.
        split_off: whether `validation` is a part of the training images that the data bring, so
            that whoever trained elsewhere may have trained on it.

    Raises:
        DataError: a single class, labels outside of the classes, a size below 1.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    size: tuple[int, int]
    pixels: bool = True
    split_off: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) == 1:
            raise DataError(
                f"data {self.name} must have at least 2 classes. Got {list(self.classes)}."
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"size must be height and width of at least 1. Got {self.size}.")
        for split in ("train", "validation", "test") if self.labelled else ():
            self._check_labels(split)

    @property
    def labelled(self) -> bool:
        """Whether the images have labels."""
        return bool(self.classes)

    @property
    def compared(self) -> Split:
        """Images that two networks are compared on: of few images none may be left for `test`."""
        return self.test if len(self.test) else self.train

    def _check_labels(self, split: str) -> None:
        labels = getattr(self, split).labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.classes):
            raise DataError(
                f"labels of the {split} split of {self.name} must be 0..{len(self.classes) - 1}. "
                f"Got {int(labels.min())}..{int(labels.max())}."
            )

    def require_classes(self, count: int, *, of: str = "the model") -> None:
        """Check that a network with `count` outputs can be measured on this data.

        Raises:
            DataError: the counts differ, or there are no labels.
        """
        self.require_labels("measuring accuracy")
        if count != len(self.classes):
            more = ", ..." if len(self.classes) > 3 else ""
            raise DataError(
                f"{of} has {count} classes, but data {self.name} has {len(self.classes)} "
                f"({', '.join(self.classes[:3])}{more}). Give the data it was trained on."
            )

    def require_labels(self, purpose: str) -> None:
        """Check that the images have labels.

        Raises:
            DataError: they have none.
        """
        if not self.labelled:
            raise DataError(
                f"{purpose} needs labels, but the images of data {self.name} lie in no class "
                "folders. Put them into one folder per class: CLASS/IMAGE or SPLIT/CLASS/IMAGE."
            )


def as_indices(indices: Indices, length: int) -> NDArray[np.int64]:
    """Indices as an int64 array; a mask is an index list too.

    Raises:
        DataError: an index outside of 0..length-1.
    """
    array = np.asarray(indices)
    array = np.flatnonzero(array) if array.dtype == bool else array.astype(np.int64)
    if array.size and not 0 <= int(array.min()) <= int(array.max()) < length:
        raise DataError(
            f"indices must be in 0..{length - 1}. Got {int(array.min())}..{int(array.max())}."
        )
    return array


@dataclass(frozen=True, eq=False)
class ArraySplit:
    """A split held in memory.

    Args:
        images: `[n, h, w, C]` uint8.
        labels: `[n]` int64.
        size: height and width to give out; images of another size are resized when read.
    """

    images: Images
    labels: Labels
    size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices) -> Images:
        """See `Split.read`."""
        chosen = self.images[as_indices(indices, len(self))]
        return chosen if chosen.shape[1:3] == self.size else fit_array(chosen, self.size)


@dataclass(frozen=True, eq=False)
class InputSplit:
    """Inputs of any network, held in memory as it takes them.

    Args:
        inputs: arrays `[n, ...]` by name of input.
        labels: `[n]` int64.
    """

    inputs: Mapping[str, NDArray[Any]]
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Indices) -> Samples:
        """See `Split.read`."""
        chosen = as_indices(indices, len(self))
        return {name: array[chosen] for name, array in self.inputs.items()}


@dataclass(frozen=True, eq=False)
class NoiseSplit:
    """Noise in place of inputs, each sample the same whenever it is read.

    Args:
        specs: the inputs by name.
        count: how many samples.
        seed: of the noise.
    """

    specs: InputSpecs
    count: int
    seed: int

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Labels:
        """They mean nothing."""
        return np.zeros(self.count, np.int64)

    def read(self, indices: Indices) -> Samples:
        """See `Split.read`."""
        chosen = as_indices(indices, len(self)).tolist()
        named = enumerate(self.specs.items())
        return {
            name: np.stack([spec.noise((self.seed, i, at)) for at in chosen])
            for i, (name, spec) in named
        }


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of another split, in the order of `indices`; made by `subset`."""

    parent: Split
    indices: NDArray[np.int64]

    @property
    def labels(self) -> Labels:
        """Class ids `[n]`."""
        return self.parent.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Indices) -> Samples:
        """See `Split.read`."""
        return self.parent.read(self.indices[as_indices(indices, len(self))])


def subset(split: Split, indices: Indices) -> Subset:
    """A view of some images; a subset of a subset refers to the first parent."""
    chosen = as_indices(indices, len(split))
    if isinstance(split, Subset):
        return Subset(split.parent, split.indices[chosen])
    return Subset(split, chosen)
