"""What a file stores as a layer's weights, read out of the way in which it decodes them.

A stored integer passes casts, moves and bit operations before a DequantizeLinear or an integer
kernel reads it. Followed from the stored tensor on, they bound the integers that can come out,
whatever the packing: a value is `u - offset` where `u` has bits within `mask` only.

    INT8: mask 0xff, offset 128                u & m: mask & m           u << k, u >> k: mask so too
    UINT8: mask 0xff, offset 0                 u | v: mask | mask        u - c: offset + c

The width is the least one that holds all integers of that range. Nothing is believed: neither names
nor what the file says of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from mpq.layers import LayerChoice

from .executed import weight_of
from .reasons import Wiring

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_SIGNED = {TensorProto.INT2: 2, TensorProto.INT4: 4, TensorProto.INT8: 8, TensorProto.INT16: 16}
_UNSIGNED = {TensorProto.UINT2: 2, TensorProto.UINT4: 4, TensorProto.UINT8: 8,
             TensorProto.UINT16: 16}  # fmt: skip
_MOVES = frozenset({
    *("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice"),
    *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "DequantizeLinear"),
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Grid:
    """The integers `u - offset` with bits of `u` within `mask`; of no `mask`: floats."""

    mask: int
    offset: int = 0

    @property
    def bits(self) -> int:
        """Least width that holds them all, 32 for floats."""
        if not self.mask:
            return 32
        if not self.offset:
            return self.mask.bit_length()
        return max((self.offset - 1).bit_length(), (self.mask - self.offset).bit_length()) + 1


@dataclass(frozen=True, slots=True)
class Stored:
    """Weights of a layer as they lie in a file.

    Args:
        type: name of the element type.
        bits: width that its decoding makes of it, 32 for floats; 0 where that cannot be known.
        low: least of the integers, where they are stored as they are; else 0.
        high: greatest, likewise.
    """

    type: str
    bits: int
    low: int = 0
    high: int = 0

    def contradiction(self, choice: LayerChoice) -> str:
        """How this is not what was asked for, or an empty string."""
        asked, floating = choice.weight, self.type in map(TensorProto.DataType.Name, FLOATS)
        if asked is None:
            return "" if floating else f"the file stores {self.type} in place of floats"
        if floating or not self.bits:
            how = "" if floating else " whose decoding to integers is not known"
            return f"the file stores {self.type}{how} in place of {asked.bits} bits"
        if self.bits != asked.bits:
            return f"the file stores {self.type} of {self.bits} bits in place of {asked.bits}"
        if self.low < asked.qmin or self.high > asked.qmax:
            return (
                f"the file stores {self.low} to {self.high}, beyond the {asked.qmin} to "
                f"{asked.qmax} of weights that take 7 bits"
            )
        return ""


def stored_weights(node: onnx.NodeProto, root: TensorProto, wiring: Wiring) -> Stored:
    """What a file stores for a matrix node.

    Args:
        node: the matrix node.
        root: the tensor that its weights are made of.
        wiring: of its graph.
    """
    grid = _grid(weight_of(node), wiring)
    found = Stored(TensorProto.DataType.Name(root.data_type), 0 if grid is None else grid.bits)
    if root.data_type != TensorProto.INT8 or root.data_location == TensorProto.EXTERNAL:
        return found
    values = numpy_helper.to_array(root)
    return replace(found, low=int(values.min(initial=0)), high=int(values.max(initial=0)))


def _grid(name: str, wiring: Wiring) -> Grid | None:
    """The integers that a value can hold; None where an operation is not known."""
    kind, node = wiring.dtype(name), wiring.producers.get(name)
    if kind in FLOATS:
        return Grid(0)
    if kind in _SIGNED:
        return Grid((1 << _SIGNED[kind]) - 1, 1 << (_SIGNED[kind] - 1))
    if kind in _UNSIGNED:
        return Grid((1 << _UNSIGNED[kind]) - 1)
    if kind or node is None:
        return None
    if node.op_type in _MOVES:
        parts = node.input if node.op_type == "Concat" else node.input[:1]
        return _union([_grid(part, wiring) for part in parts])
    if node.op_type == "Mul":  # a decoding without DequantizeLinear: integers times a float scale
        known = [_grid(factor, wiring) for factor in node.input]
        return next((grid for grid in known if grid is None or grid.mask), Grid(0))
    return _calculated(node, wiring)


def _calculated(node: onnx.NodeProto, wiring: Wiring) -> Grid | None:
    """What a bit operation or a difference makes of a grid."""
    first = _grid(node.input[0], wiring)
    if first is None or not first.mask or len(node.input) != 2:
        return None
    if node.op_type == "BitwiseOr":
        second = _grid(node.input[1], wiring)
        return _union([first, second]) if not first.offset else None
    constant = wiring.array(node.input[1])
    if constant is None:
        return None
    ones = int(np.bitwise_or.reduce(constant.astype(np.int64), axis=None))
    if node.op_type == "BitwiseAnd":
        if set(np.unique(constant)) <= {0.0, -1.0}:
            return first  # what is kept is kept whole
        return None if first.offset else Grid(first.mask & ones)
    if constant.size != 1:
        return None
    if node.op_type == "Sub":
        return replace(first, offset=first.offset + ones)
    if node.op_type == "BitShift" and not first.offset:
        left = any(a.name == "direction" and a.s == b"LEFT" for a in node.attribute)
        return Grid((first.mask << ones) & 0xFF if left else first.mask >> ones)
    return None


def _union(grids: list[Grid | None]) -> Grid | None:
    """The integers of several values together."""
    known = [grid for grid in grids if grid is not None]
    if len(known) < len(grids) or len({grid.offset for grid in known}) != 1:
        return None
    mask = 0
    for grid in known:
        mask |= grid.mask
    return Grid(mask, known[0].offset)
