"""`InputSpec`: one tensor that a network takes, as a value with a text form.

`3,224,224` is an image and `1,16000` a signal of float32, `77:int64` a row of indices, `:int64` one
number for each sample. The batch is not said. `parse` and `str` are inverses. Inputs go by name, of
the argument or, in a tree, by its path: `image`, `batch.mask`, `features.0`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from mpq.errors import UsageError, nearest

Dtype = Literal["float32", "uint8", "int32", "int64", "bool"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
FORMS = "C,H,W or H,W or one side in pixels, or NAME=SIZES[:DTYPE] for each input"


@dataclass(frozen=True, slots=True)
class InputSpec:
    """Sizes and type of one input.

    Args:
        shape: of one sample, without the batch.
        dtype: of its values.

    Raises:
        UsageError: a size below 1, or another type.
    """

    shape: tuple[int, ...]
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UsageError(
                f"the type of an input must be one of {', '.join(DTYPES)}. Got {self.dtype!r}"
                f"{nearest(self.dtype, DTYPES)}"
            )
        if any(size < 1 for size in self.shape):
            raise UsageError(f"the sizes of an input must be at least 1. Got {list(self.shape)}.")

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read the text form.

        Raises:
            UsageError: text of another form.
        """
        sizes, colon, dtype = text.partition(":")
        parts = [part.strip() for part in sizes.split(",")] if sizes.strip() else []
        if not all(part.isdecimal() for part in parts) or not (parts or colon):
            raise UsageError(
                f"an input must be {FORMS}, without the batch, as in 3,224,224 or ids=77:int64. "
                f"Got {text!r}."
            )
        return cls(tuple(map(int, parts)), dtype.strip() if colon else "float32")  # type: ignore[arg-type]

    @classmethod
    def of(cls, batch: Any) -> InputSpec:
        """That of a batch: a tensor or an array `[n, ...]`.

        Raises:
            UsageError: one of a type that no file takes.
        """
        return cls(tuple(batch.shape[1:]), str(batch.dtype).removeprefix("torch."))  # type: ignore[arg-type]

    def __str__(self) -> str:
        dtype = "" if self.dtype == "float32" and self.shape else f":{self.dtype}"
        return ",".join(map(str, self.shape)) + dtype

    @property
    def values(self) -> int:
        """How many values one sample has."""
        return math.prod(self.shape)

    def noise(self, seed: Iterable[int]) -> NDArray[Any]:
        """One sample: standard normal floats, pixels 0..255, truth values.

        Other whole numbers are 0 or 1, which any table of indices holds.
        """
        rng = np.random.default_rng(list(seed))
        if self.dtype == "float32":
            return rng.standard_normal(self.shape, np.float32)
        top = 256 if self.dtype == "uint8" else 2
        return rng.integers(0, top, self.shape).astype(self.dtype)


InputSpecs: TypeAlias = Mapping[str, InputSpec]
Shape: TypeAlias = tuple[int, ...] | InputSpecs
"""What a person says that a network takes: `(C, H, W)` or `(H, W)` of images, or inputs by name."""


def parse_shape(texts: Iterable[str]) -> Shape | None:
    """What `--input-shape` says, given once for an image and once for each input by its name.

    An input without a name (`1,8,16,16`, `77:int64`) is the first argument; its name is empty.

    Raises:
        UsageError: text of another form, or a name twice.
    """
    texts = [text.strip() for text in texts]
    if not texts:
        return None
    if len(texts) == 1 and (sizes := _image(texts[0])):
        return sizes
    found: dict[str, InputSpec] = {}
    for text in texts:
        name, equals, spec = text.rpartition("=")
        if name.strip() in found or (not equals and len(texts) > 1):
            raise UsageError(
                f"--input-shape must be {FORMS}, each name once. Got {', '.join(texts)}."
            )
        found[name.strip()] = InputSpec.parse(spec)
    return found


def _image(text: str) -> tuple[int, ...] | None:
    """Sizes of an image; one side stands for both."""
    parts = [part.strip() for part in text.split(",")]
    if not 1 <= len(parts) <= 3 or not all(part.isdecimal() for part in parts):
        return None
    sizes = tuple(map(int, parts))
    if min(sizes) < 1:
        raise UsageError(f"--input-shape must be {FORMS}, sizes of at least 1. Got {text!r}.")
    return sizes * 2 if len(sizes) == 1 else sizes
