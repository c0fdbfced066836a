"""A torch `Dataset`, or anything with items and a length, as a split that reads what is asked for.

An item is a picture (PIL, uint8 `[C, H, W]` tensor or `[H, W, C]` array, floats `[C, H, W]` as the
network takes them), a tuple of it and a class id, or a dict with both. Torch is not needed here.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mpq.data.batches import INPUTS, LABELS
from mpq.data.dataset import Images, Indices, Labels, as_indices
from mpq.data.images import Fit, as_channels, fit, mode_of
from mpq.errors import DataError
from mpq.userimport import raised


@dataclass(eq=False)
class ItemSplit:
    """Items of a data set.

    Args:
        items: with `len` and an item for each index.
        where: names them in messages.
        size: height and width to bring pictures to; None: those of the first.
        channels: of pictures; None: those of the first.
        how: PIL pictures are brought to the size, if the network says so.
    """

    items: Any
    where: str
    size: tuple[int, int] | None = None
    channels: int | None = None
    how: Fit | None = None

    def __post_init__(self) -> None:
        if not len(self.items):
            raise DataError(f"{self.where} must have at least one item. Got none.")
        first = self._image(0)
        self.size = self.size or (first.shape[0], first.shape[1])
        self.channels = self.channels or int(first.shape[2])
        self.dtype = first.dtype

    def __len__(self) -> int:
        return len(self.items)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all images as an array."""
        return len(self), *(self.size or ()), self.channels or 3

    @property
    def labelled(self) -> bool:
        """Whether the first item has a class id."""
        return class_id(self._item(0)) is not None

    @cached_property
    def labels(self) -> Labels:
        """Class ids `[n]`: as the data set lists them (`targets`, `labels`), else of each item."""
        known = _listed(self.items)
        if known is not None and known.shape == (len(self),):
            return known
        return np.array([self._label(i) for i in range(len(self))], np.int64)

    def read(self, indices: Indices) -> Images:
        """See `Split.read`.

        Raises:
            DataError: an item is no picture, or of another size.
        """
        chosen: NDArray[np.int64] = as_indices(indices, len(self))
        out = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        for row, index in enumerate(chosen):
            found = self._image(int(index))
            if found.shape != out.shape[1:] or found.dtype != self.dtype:
                raise DataError(
                    f"all items of {self.where} must be {self.dtype} {list(out.shape[1:])} "
                    f"[H, W, C], as the first is. Got {found.dtype} {list(found.shape)} of item "
                    f"{index}. Resize them there, or give PIL pictures, which are brought to size."
                )
            out[row] = found
        return out

    def picture(self, index: int) -> Image.Image:
        """See `FolderSplit.picture`."""
        found = image_of(self._item(index))
        if isinstance(found, Image.Image):
            return found.convert(mode_of(self.channels or 3))
        return Image.fromarray(as_pixels(found, f"item {index} of {self.where}").squeeze())

    def mark(self) -> str:
        """Differs for other sizes and class ids; items may be random and are not looked at."""
        return f"{self.where} {self.shape} {zlib.crc32(self.labels.tobytes()):08x}"

    def _item(self, index: int) -> Any:
        try:
            return self.items[index]
        except Exception as error:  # the user's code can fail in any way
            raise DataError(f"item {index} of {self.where} failed with {raised(error)}") from error

    def _image(self, index: int) -> NDArray[Any]:
        found, where = image_of(self._item(index)), f"item {index} of {self.where}"
        if isinstance(found, Image.Image):
            image = found.convert(mode_of(self.channels or 3))
            found = np.asarray(fit(image, self.size, self.how) if self.size else image)
        pixels = as_pixels(found, where)
        if self.channels and pixels.dtype == np.uint8 and pixels.shape[2] != self.channels:
            pixels = as_channels(pixels[None], self.channels, of=where)[0]
        return pixels

    def _label(self, index: int) -> int:
        found = class_id(self._item(index))
        if found is None:
            raise DataError(
                f"item {index} of {self.where} must have a class id as the first has. Got none."
            )
        return found


def is_items(value: Any) -> bool:
    """Whether a value has items and a length, and is neither arrays nor batches."""
    has = hasattr(value, "__getitem__") and hasattr(value, "__len__")
    return (
        has and not isinstance(value, Mapping | tuple | list | str) and not hasattr(value, "ndim")
    )


def image_of(item: Any) -> Any:
    """The picture of an item."""
    if isinstance(item, Mapping):
        return next((item[key] for key in INPUTS if key in item), None)
    return item[0] if isinstance(item, tuple | list) and item else item


def class_id(item: Any) -> int | None:
    """The class id of an item, if it has one."""
    if isinstance(item, Mapping):
        found = next((item[key] for key in LABELS if key in item), None)
    else:
        found = item[1] if isinstance(item, tuple | list) and len(item) > 1 else None
    array = None if found is None or isinstance(found, Mapping | str) else np.asarray(found)
    whole = array is not None and array.shape == () and array.dtype.kind in "iu"
    return int(array) if whole and array is not None else None


def as_pixels(found: Any, where: str) -> NDArray[Any]:
    """A picture as `[H, W, C]`: uint8, or float32 as the network takes it.

    Raises:
        DataError: it is none.
    """
    tensor = hasattr(found, "detach")
    array = found.detach().cpu().numpy() if tensor else np.asarray(found)
    array = array.astype(np.float32) if array.dtype.kind == "f" else array
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and (tensor or array.dtype == np.float32) and not _channels_last(array):
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.dtype not in (np.uint8, np.float32):
        raise DataError(
            f"{where} must be a picture: PIL, uint8 [C, H, W] as a tensor or [H, W, C] as an "
            f"array, or floats [C, H, W]. Got {type(found).__name__} of {array.dtype} "
            f"{list(array.shape)}."
        )
    return array


def _channels_last(array: NDArray[Any]) -> bool:
    return array.shape[2] in (1, 3, 4) and array.shape[0] not in (1, 3, 4)


def _listed(items: Any) -> Labels | None:
    """Class ids that a data set of torch lists, as torchvision's and subsets of them do."""
    inner, picked = getattr(items, "dataset", None), getattr(items, "indices", None)
    if inner is not None and picked is not None:
        known = _listed(inner)
        return None if known is None else known[np.asarray(picked)]
    found = getattr(items, "targets", getattr(items, "labels", None))
    if found is None and getattr(items, "tensors", None):
        found = items.tensors[-1]
    if found is None or callable(found):
        return None
    array = np.asarray(found)
    return array.astype(np.int64) if array.ndim == 1 and array.dtype.kind in "iu" else None
