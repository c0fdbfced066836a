"""Transforms of torchvision (v2) for training, applied by worker processes to single pictures.

`crop` is torchvision's `RandomResizedCrop` to the network's size, with which ImageNet networks are
trained; anything else is `module:factory`, which gives a transform of the user's. It is given the
picture alone: boxes and masks are transformed by the data set of the user's own `--batches`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq._torchvision import transforms
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
            made = self._applied(self._picture(index))
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

    def _applied(self, picture: Any) -> Any:
        try:
            return self.transform.apply(picture)
        except Exception as error:  # the user's code can fail in any way
            name = self.transform.name
            raise DataError(f"--transform {name} failed with {raised(error)}") from error
