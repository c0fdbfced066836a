"""Arrays as data: images as uint8, anything else as the network takes it.

A `.npz` has an array for each input by its name and perhaps `labels`; a `.npy` has the only input.
Images are uint8 `[n, H, W, C]`, or `[n, H, W]` for grey, and are normalized as those of files are.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.data.batches import LABELS, Named, named
from mpq.data.dataset import ArraySplit, InputSplit, NoiseSplit, Split
from mpq.data.images import as_channels
from mpq.data.splits import Splits
from mpq.errors import DataError, nearest
from mpq.inputs import InputSpec, InputSpecs
from mpq.limits import check_file

SUFFIXES = (".npy", ".npz")
NOISE = 1024
"""Samples of noise to work on, and a quarter as many to compare on."""


def is_array_file(path: Path) -> bool:
    """Whether a path is that of a file of arrays."""
    return path.suffix.lower() in SUFFIXES and path.is_file()


def open_arrays(path: Path, size: tuple[int, ...] | None, takes: InputSpecs | None) -> Splits:
    """The arrays in a file, as one split.

    Args:
        path: `.npy` or `.npz`.
        size: `(H, W)` or `(C, H, W)` of images; None keeps their own.
        takes: inputs of a network that takes more than one batch of images.

    Raises:
        DataError: no file of arrays, or arrays that the network does not take.
    """
    check_file(path, "file_mb", DataError)
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            found = {"input": content}
        else:
            with content:
                found = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} must be a .npy or .npz file of arrays: {error}") from None
    labels = next(
        (found.pop(name) for name in LABELS if name in found.keys() - (takes or {})), None
    )
    arrays = named(_wanted(found, takes, str(path)), labels, str(path))
    return splits_of({"train": arrays}, size, takes, str(path))


def _wanted(found: dict[str, Any], takes: InputSpecs | None, where: str) -> dict[str, Any]:
    """The arrays that a network takes, by its names; a lone one may have any name.

    Raises:
        DataError: one is missing, or there are several where the network takes images.
    """
    names = ["input"] if takes is None else list(takes)
    if len(found) == len(names) == 1:
        return {names[0]: next(iter(found.values()))}
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(
            f"{where} must have the arrays {', '.join(names)}, and labels if it has any. Got "
            f"{', '.join(found)}{nearest(missing[0], found) or '.'}"
        )
    return {name: found[name] for name in names}


def noise_splits(takes: InputSpecs) -> Splits:
    """Noise of the right sizes and types, where there are no data; without labels."""
    train, test = (NoiseSplit(takes, count, i) for i, count in enumerate((NOISE, NOISE // 4)))
    return Splits((), train, NoiseSplit(takes, 0, 0), test, (1, 1), pixels=False)


def splits_of(
    found: dict[str, Named], size: tuple[int, ...] | None, takes: InputSpecs | None, where: str
) -> Splits:
    """Splits of arrays; without labels unless all have some.

    Args:
        found: by `train`, `validation` and `test`.
        size: as of `open_arrays`, like the following.
        takes: inputs.
        where: names the data in messages.

    Raises:
        DataError: arrays that the network does not take.
    """
    labels = {split: ids for split, (_, ids) in found.items() if ids is not None}
    labelled = len(labels) == len(found) and all((ids >= 0).all() for ids in labels.values())
    classes = tuple(map(str, range(int(labels["train"].max()) + 1))) if labelled else ()
    made: dict[str, Split] = {}
    pixels, shape = takes is None and are_pixels(found["train"][0]), (1, 1)
    if takes is None and not pixels and size and len(size) == 3:
        takes = dict.fromkeys(found["train"][0], InputSpec(size))
    for split, (inputs, ids) in found.items():
        count = len(next(iter(inputs.values())))
        ids = ids if ids is not None and labelled else np.zeros(count, np.int64)
        if pixels:
            images = channelled(next(iter(inputs.values())), size, where)
            shape = (*(size or images.shape[1:3]),)[-2:]
            made[split] = ArraySplit(images, ids, shape)
        else:
            specs = takes or {}
            given = {name: fitting(x, specs.get(name), name, where) for name, x in inputs.items()}
            made[split] = InputSplit(given, ids)
    return Splits(
        classes, made["train"], made.get("validation"), made.get("test"), shape, pixels=pixels
    )


def are_pixels(inputs: dict[str, NDArray[Any]]) -> bool:
    """Whether inputs are uint8 images `[n, H, W, C]` or `[n, H, W]` and nothing else."""
    first = next(iter(inputs.values()))
    return len(inputs) == 1 and first.dtype == np.uint8 and first.ndim in (3, 4)


def channelled(images: NDArray[Any], size: tuple[int, ...] | None, where: str) -> NDArray[Any]:
    """Images `[n, H, W, C]` with the channels asked for, RGB by default; grey is repeated.

    Raises:
        DataError: they have others.
    """
    planes = images[..., None] if images.ndim == 3 else images
    channels = size[0] if size and len(size) == 3 else 3
    own = int(planes.shape[-1])
    if own != channels and {own, channels} != {1, 3}:  # of channels first the width would be taken
        raise DataError(
            f"images of {where} must be uint8 [n, H, W, {channels}], or [n, H, W] for grey. Got "
            f"{images.dtype} {list(images.shape)}."
        )
    return as_channels(planes, channels, of=where)


def fitting(array: NDArray[Any], spec: InputSpec | None, name: str, where: str) -> NDArray[Any]:
    """An array of the type that an input has; floats become float32, whole numbers wider ones.

    Raises:
        DataError: another type, or other sizes.
    """
    want = np.dtype(spec.dtype if spec else np.float32 if array.dtype.kind == "f" else array.dtype)
    safe = array.dtype.kind == want.kind == "f" or np.can_cast(array.dtype, want, "safe")
    fits = spec is None or array.shape[1:] == spec.shape
    if not fits or not safe or (want.kind == "f") != (array.dtype.kind == "f"):
        asked = f"{want} [n, {', '.join(map(str, spec.shape))}]" if spec else str(want)
        raise DataError(
            f"{name or 'the input'} of {where} must be {asked.replace(', ]', ']')}, as the network "
            f"takes it. Got {array.dtype} {list(array.shape)}. Convert it, or give the shape with "
            "--input-shape."
        )
    return array.astype(want, copy=False)
