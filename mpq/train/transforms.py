"""Transforms of torchvision (v2) for training, applied by worker processes to single pictures.

`crop` is torchvision's `RandomResizedCrop` to the network's size, with which ImageNet networks are
trained; anything else is `module:factory`, which gives a transform of the user's. Pictures of
`--data` are given alone, in the workers; samples of `--batches` with their targets, batch by batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import _pytree as pytree

from mpq._torchvision import transforms, tv_tensors
from mpq.batch import described, inputs_of, rows, stacked
from mpq.calls import count, leaves
from mpq.data.items import as_pixels
from mpq.data.stream import Stream, picture
from mpq.errors import DataError, UsageError
from mpq.train.deliver import seeded
from mpq.userimport import made_by, raised

CROP = "crop"


@dataclass(frozen=True)
class Transform:
    """What is done to a picture.

    Args:
        name: as the user gave it.
        apply: to a picture.
    """

    name: str
    apply: Callable[..., Any]

    def __call__(self, given: Any) -> Any:
        """What it makes of a picture, or of a sample.

        Raises:
            DataError: it fails.
        """
        try:
            return self.apply(given)
        except Exception as error:  # the user's code can fail in any way
            raise DataError(f"--transform {self.name} failed with {raised(error)}") from error


def transform_of(name: Transform | str | None, size: tuple[int, int]) -> Transform | None:
    """The transform under a name; one that is one already, or None, as it is.

    Args:
        name: `crop`, or `module:factory`.
        size: height and width of the network's images.

    Raises:
        UsageError: there is none.
        DataError: the factory fails, or gives nothing that can be called.
    """
    if not isinstance(name, str):
        return name
    if name == CROP:
        return Transform(name, transforms().RandomResizedCrop(size, antialias=True))
    if ":" not in name:
        raise UsageError(f"--transform must be {CROP} or module:factory. Got {name!r}.")
    made = made_by(name, "--transform", DataError)
    if not callable(made):
        raise DataError(
            f"--transform {name} must give a transform, such as torchvision.transforms.v2.Compose. "
            f"Got {type(made).__name__}."
        )
    return Transform(name, made)


class Transformed:
    """Reads batches of transformed images, the same whoever reads them.

    Args:
        images: in files, or as an array.
        transform: of one picture.
        seed: of the epoch; each sample has its own random numbers.
    """

    def __init__(self, images: Any, transform: Transform, seed: tuple[int, int]) -> None:
        self.images, self.transform, self.seed = images, transform, seed

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Images `[n, H, W, C]`.

        Raises:
            DataError: the transform fails, or gives another size.
        """
        return np.stack([self._one(int(index)) for index in indices])

    def _one(self, index: int) -> NDArray[Any]:
        with seeded(self.seed[0] % 2**32, self.seed[1], index):
            made = self.transform(self._picture(index))
        found = as_pixels(made, f"what --transform {self.transform.name} gives of image {index}")
        if found.shape != self.images.shape[1:] or found.dtype != self.images.dtype:
            wanted = f"{self.images.dtype} {list(self.images.shape[1:])}"
            raise DataError(
                f"--transform {self.transform.name} must give images {wanted} [H, W, C], as the "
                f"network takes them. Got {found.dtype} {list(found.shape)} of image {index}. Let "
                "it end with a crop or Resize to that size, and leave normalization to mpq."
            )
        return found

    def _picture(self, index: int) -> Any:
        if isinstance(self.images, Stream):
            return picture(self.images.split, index)
        from PIL import Image

        return Image.fromarray(self.images[index].squeeze())


def followed(batch: Any, transform: Transform, seed: tuple[int, ...]) -> Any:
    """A batch of the user's own with each sample transformed, its targets with its image.

    A sample goes to the transform in its own structure, as torchvision's v2 takes it: the image, a
    picture or mask `[..., H, W]` of its size, and `boxes [M, 4]` of a dict (x1, y1, x2, y2) as what
    they are (`torchvision.tv_tensors`), and all else, such as labels, as it is.

    Args:
        batch: of images `[N, C, H, W]` and what comes with them.
        transform: that is applied.
        seed: of the batch; each sample has its own random numbers.

    Raises:
        DataError: the transform fails, or samples come in several sizes.
    """
    inputs = inputs_of(batch)
    total, size = count(inputs), tuple(next(iter(leaves(inputs).values())).shape[-2:])
    found = []
    for at in range(total):
        sample = _marked(rows(batch, at, total), size)
        with seeded(seed[0] % 2**32, *seed[1:], at):
            found.append(_plain(transform(sample)))
    try:
        return stacked(batch, found, total)
    except RuntimeError as error:
        raise DataError(
            f"--transform {transform.name} must bring images to one size. Got "
            f"{', '.join(sorted({described(inputs_of(sample)) for sample in found}))} in a batch. "
            "Let it end with a crop or Resize to the network's size."
        ) from error


def _marked(part: Any, size: tuple[int, ...], key: Any = None) -> Any:
    """A sample as torchvision's transforms know it."""
    kinds = tv_tensors()
    if isinstance(part, Mapping):
        return {name: _marked(value, size, name) for name, value in part.items()}
    if isinstance(part, tuple | list):
        return type(part)(_marked(value, size) for value in part)
    if type(part) is not Tensor:
        return part
    if key == "boxes" and part.shape[-1:] == (4,):
        return kinds.BoundingBoxes(part, format="XYXY", canvas_size=size)
    if part.ndim < 2 or part.shape[-2:] != size:
        return part
    picture = part.ndim == 3 and part.is_floating_point()
    return kinds.Image(part) if picture else kinds.Mask(part)


def _plain(part: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.as_subclass(Tensor), part)
