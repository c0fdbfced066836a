"""Raw images in: uint8 pixels enter the graph, and their normalization is part of it.

`x = (p / 255 - mean) / std` per channel is two operations on floats before the first quantizer,
`a p + b`, which is where the one boundary of an integer network lies anyway: no layer changes its
kernel. The weights of the first convolution could take the scale in and its bias the mean, but zero
padding is zero of `x`, not of `p`, and weights scaled per input channel round otherwise: that would
be another network than the one that was trained. The two operations are held against the formula
for each of the 256 values of each channel; where one integer of the quantizer would differ, the
formula is written out as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mpq.data import Normalization
from mpq.errors import ExportError

from .edit import Writer, take_over

Array = NDArray[np.float32]
ALL = np.arange(256, dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class PixelInput:
    """An input of raw images.

    Args:
        normalize: what training did to them.
        channels_last: `[N, H, W, C]` as image libraries give them; otherwise `[N, C, H, W]`.
    """

    normalize: Normalization
    channels_last: bool = True

    def pixels(self, x: Array) -> NDArray[np.uint8]:
        """The pixels `[N, H, W, C]` of normalized images `[N, C, H, W]`, exactly."""
        each = self.normalize.of(x.shape[1])
        mean, std = (np.array(v)[:, None, None] for v in (each.mean, each.std))
        p = np.rint((x.astype(np.float64) * std + mean) * 255).clip(0, 255).astype(np.uint8)
        return np.ascontiguousarray(p.transpose(0, 2, 3, 1))


def take_pixels(model: ir.Model, how: PixelInput) -> None:
    """Make the input of a placed model raw images, in place.

    Raises:
        ExportError: the model does not take images.
        DataError: the normalization is for images of other channels.
    """
    old, *others = model.graph.inputs
    shape = old.shape
    if others or shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        got = ", ".join(str(value.shape) for value in model.graph.inputs)
        raise ExportError(f"--input uint8 needs a network of images [N, C, H, W]. Got input {got}.")
    n, c, h, w = shape
    each = how.normalize.of(shape[1])
    order = ir.Shape([n, h, w, c] if how.channels_last else [n, c, h, w])
    new = ir.val("pixels", ir.DataType.UINT8, order)
    write, value = Writer(model.graph, model.graph[0]), new
    if how.channels_last:
        value = write.node("Transpose", value, perm=[0, 3, 1, 2])
    value = write.node("Cast", value, to=ir.DataType.FLOAT)
    for op, operand in _arithmetic(each, _quantizer(old)):
        value = write.node(op, value, write.constant(operand.reshape(-1, 1, 1)))
    take_over(old, value)
    model.graph.inputs[0] = new


def _arithmetic(how: Normalization, quantizer: Grid | None) -> list[tuple[str, Array]]:
    """Operations on the pixels as floats, and their operands per channel."""
    mean, std = (np.array(v, np.float32) for v in (how.mean, how.std))
    factor = np.array([1 / (255 * s) for s in how.std], np.float32)
    offset = np.array([-m / s for m, s in zip(how.mean, how.std, strict=True)], np.float32)
    short = [("Mul", factor), ("Add", offset)]
    plain = [("Div", np.full(1, 255, np.float32)), ("Sub", mean), ("Div", std)]
    if quantizer is None:
        return plain
    p = np.broadcast_to(ALL.astype(np.float32)[:, None], (256, len(mean)))
    asked = ((p / np.float32(255)) - mean) / std
    given = p * factor + offset
    same = _integers(asked, quantizer) == _integers(given, quantizer)
    return short if bool(same.all()) else plain


class Grid(NamedTuple):
    """Scale and zero point of a quantizer, and its highest integer."""

    scale: float
    zero: int
    highest: int


def _integers(x: Array, grid: Grid) -> Array:
    q = np.rint(x / np.float32(grid.scale)) + np.float32(grid.zero)
    clipped: Array = np.clip(q, 0, grid.highest)
    return clipped


def _quantizer(value: ir.Value) -> Grid | None:
    """The QuantizeLinear that alone reads a value; None without one."""
    readers = [node for node, _ in value.uses()]
    while len(readers) == 1 and readers[0].op_type == "SpaceToDepth":
        readers = [node for node, _ in readers[0].outputs[0].uses()]
    if len(readers) != 1 or readers[0].op_type != "QuantizeLinear":
        return None
    scale, zero = (v.const_value if v is not None else None for v in readers[0].inputs[1:3])
    if scale is None or zero is None:
        return None
    integer = zero.numpy()
    return Grid(float(scale.numpy()), int(integer), int(np.iinfo(integer.dtype).max))
