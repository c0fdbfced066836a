"""What a model file takes: its inputs as arrays by name, checked, and in batches.

Neither torch nor the runtime is imported: a session is asked what it takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from mpq.errors import DataError
from mpq.inputs import DTYPES, InputSpec

Array = NDArray[Any]
Feed: TypeAlias = "Array | Mapping[str, Array] | Sequence[Array]"
"""Arrays by name of input or in the order of the inputs, or the array of the only one."""
_IMAGES = ("tensor(float)", "tensor(uint8)")
_TYPES = {"tensor(float)": "float32", "tensor(double)": "float64"} | {
    f"tensor({name})": name
    for name in ("float16", "bool", "uint8", "int8", "int16", "int32", "int64")
}


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What a model file takes: one tensor of images.

    Args:
        name: of the input tensor.
        integer: uint8 pixels; otherwise float32.
        channels_last: NHWC instead of NCHW.
        batch: number of images the file is fixed to, None for any.
        channels: channels of an image.
        height: of an image in pixels, None for any.
        width: likewise.
    """

    name: str
    integer: bool
    channels_last: bool
    batch: int | None
    channels: int
    height: int | None
    width: int | None

    def shape(self, batch: int, *, side: int = 224) -> tuple[int, ...]:
        """The shape of a whole input; `side` stands in for a free height or width."""
        h, w, c = self.height or side, self.width or side, self.channels
        return (batch, h, w, c) if self.channels_last else (batch, c, h, w)


def takes_images(loaded: Any) -> bool:
    """Whether a session takes one batch of images and nothing else."""
    inputs = loaded.get_inputs()
    return len(inputs) == 1 and len(inputs[0].shape) == 4 and inputs[0].type in _IMAGES


def specs_of(loaded: Any, *, side: int = 224) -> dict[str, InputSpec] | None:
    """The inputs of a session by name; `side` stands in for free sizes. None of other types."""
    found: dict[str, InputSpec] = {}
    for one in loaded.get_inputs():
        kind = next((k for k in DTYPES if k == _TYPES.get(one.type)), None)
        if kind is None or not one.shape:
            return None
        sizes = tuple(n if isinstance(n, int) else side for n in one.shape[1:])
        found[str(one.name)] = InputSpec(sizes, kind)
    return found


def model_input(loaded: Any) -> ModelInput:
    """What a session takes.

    Raises:
        DataError: the model does not take one batch of images.
    """
    inputs = loaded.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        listed = ", ".join(f"{i.name}: {i.type}{i.shape}" for i in inputs)
        raise DataError(f"the model must take one tensor of 4 dimensions (images). Got {listed}.")
    kind, shape = inputs[0].type, [d if isinstance(d, int) else None for d in inputs[0].shape]
    if kind not in _IMAGES:
        raise DataError(f"input {inputs[0].name} must be float32 or uint8. Got {kind} instead.")
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    channels, height, width = (shape[3], *shape[1:3]) if last else shape[1:]
    name = str(inputs[0].name)
    return ModelInput(name, kind == "tensor(uint8)", last, shape[0], channels or 3, height, width)


def feeds(loaded: Any, inputs: Feed) -> dict[str, Array]:
    """Arrays by name, checked against what the model takes."""
    takes = loaded.get_inputs()
    names = [str(t.name) for t in takes]
    if takes_images(loaded) and isinstance(inputs, np.ndarray):
        return {names[0]: arrange(inputs, model_input(loaded))}
    inputs = named(inputs, names)
    for one in takes:
        x, want = inputs[one.name], _TYPES.get(one.type, one.type)
        pairs = list(zip(one.shape, x.shape, strict=False))[1:]
        fits = x.ndim == len(one.shape) and all(d == n or not isinstance(d, int) for d, n in pairs)
        if str(x.dtype) != want or not fits:
            raise DataError(
                f"input {one.name} must be {want} of shape {one.shape}. Got {x.dtype} of shape "
                f"{list(x.shape)} instead."
            )
    return {name: inputs[name] for name in names}


def named(inputs: Feed, names: Sequence[str]) -> Mapping[str, Array]:
    """Arrays by name of input.

    Raises:
        DataError: too few or too many, or other names.
    """
    if isinstance(inputs, np.ndarray):
        inputs = [inputs]
    given = inputs if isinstance(inputs, Mapping) else dict(zip(names, inputs, strict=False))
    if set(given) != set(names) or len(inputs) != len(names):
        got = list(inputs) if isinstance(inputs, Mapping) else f"{len(inputs)} arrays"
        raise DataError(f"the model takes the inputs {', '.join(names)}. Got {got}.")
    return given


def arrange(images: Array, takes: ModelInput) -> Array:
    """`images` in the layout that the model takes, checked (see `run`)."""
    want = np.uint8 if takes.integer else np.float32
    if images.ndim != 4 or images.dtype != want:
        raise DataError(
            f"images for input {takes.name} must be {np.dtype(want)} of 4 dimensions. "
            f"Got {images.dtype} of shape {images.shape} instead."
        )
    sizes: tuple[int | None, ...] = (takes.channels, takes.height, takes.width)
    turned = images.transpose(0, 3, 1, 2)
    if takes.channels_last:
        sizes, turned = (*sizes[1:], takes.channels), images.transpose(0, 2, 3, 1)
    for layout in (images, turned):
        if all(size in (None, n) for size, n in zip(sizes, layout.shape[1:], strict=True)):
            return layout
    raise DataError(
        f"images for input {takes.name} must be {_by(takes.shape(1)[1:])} each. "
        f"Got {_by(images.shape[1:])} instead."
    )


def parts(feeds: Mapping[str, Array], total: int, step: int) -> Iterator[dict[str, Array]]:
    """What is fed at a time: `step` samples of `total`."""
    for rows in (slice(start, start + step) for start in range(0, total, step)):
        yield {n: np.ascontiguousarray(x[rows]) if x.ndim else x for n, x in feeds.items()}


def fixed_batch(loaded: Any) -> int | None:
    """The number of samples that a model is fixed to; None: it takes any."""
    sizes = [t.shape[0] for t in loaded.get_inputs() if t.shape]
    return next((s for s in sizes if isinstance(s, int)), None)


def noise(loaded: Any, batch: int, *, side: int = 224) -> dict[str, Array]:
    """A batch of random samples of a fixed seed for every input; `side` stands in for free sizes.

    Whole numbers are 0 or 1, which any table of indices holds, but for uint8 pixels.
    """
    rng, feeds, batch = np.random.default_rng(0), {}, fixed_batch(loaded) or batch
    for one in loaded.get_inputs():
        kind = np.dtype(_TYPES[one.type])
        shape = [n if isinstance(n, int) else side for n in one.shape]
        shape[:1] = [batch] * len(shape[:1])
        if kind.kind == "f":
            feeds[str(one.name)] = rng.standard_normal(shape, np.float32).astype(kind, copy=False)
        else:
            top = 256 if kind == np.uint8 else 2
            feeds[str(one.name)] = rng.integers(0, top, shape, np.uint8).astype(kind, copy=False)
    return feeds


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(v) for v in shape)
