"""Bit-packed weights of any width below 8, unpacked by operations that fold at load.

A `b`-bit weight is stored as the unsigned `u = q + 2^(b-1)`, cut into planes of 4, 2 or 1 bits
(5 = 4 + 1), because those fill bytes evenly. Of a plane of `p` bits, `k = 8/p` values share a byte:
byte `i` holds values `i, i + L, ..., i + (k-1) L` from its low bits up, `L` being the number of
bytes, so that unpacking is a mask and shift for each of `k` parts and one Concat. `encode` and
`decode` are inverses; the graph does what `decode` does. Runs on onnxruntime 1.18 or newer.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mpq.spec import plane_widths

Bytes = NDArray[np.uint8]


def encode(weights: NDArray[np.int8], bits: int) -> list[Bytes]:
    """The planes of signed `bits`-bit integers of any shape, low bits first, one array each."""
    u = weights.reshape(-1).astype(np.int16) + (1 << (bits - 1))
    u = np.pad(u, (0, -len(u) % 8)).astype(np.uint8)
    planes, shift = [], 0
    for width in plane_widths(bits):
        values = (u >> shift) & ((1 << width) - 1)
        parts = values.reshape(8 // width, -1)
        packed = np.zeros(parts.shape[1], np.uint8)
        for k, part in enumerate(parts):
            packed |= (part << (width * k)).astype(np.uint8)
        planes.append(packed)
        shift += width
    return planes


def decode(planes: list[Bytes], bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """The integers of `encode`d planes."""
    u, shift = np.zeros(len(planes[0]) * 8 // plane_widths(bits)[0], np.uint8), 0
    for width, packed in zip(plane_widths(bits), planes, strict=True):
        mask = (1 << width) - 1
        parts = [(packed >> (width * k)) & mask for k in range(8 // width)]
        u |= (np.concatenate(parts) << shift).astype(np.uint8)
        shift += width
    count = int(np.prod(shape))
    return (u[:count].astype(np.int32) - (1 << (bits - 1))).astype(np.int8).reshape(shape)


class Unpacker:
    """Writes the nodes that `decode` one weight before a given node.

    Args:
        graph: where to write.
        anchor: the node before which the new ones go.
        name: stem of the new initializers' names.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node, name: str) -> None:
        self.graph, self.anchor, self.name = graph, anchor, name
        self.made = 0

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """An initializer; equal ones of different weights are merged afterwards."""
        self.made += 1
        value = ir.val(f"{self.name}.{self.made}", const_value=ir.tensor(array))
        self.graph.register_initializer(value)
        return value

    def node(self, op: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        """A node with one output."""
        node = ir.node(op, list(inputs), attributes=attributes)  # type: ignore[arg-type]
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]

    def weight(self, weights: NDArray[np.int8], bits: int) -> ir.Value:
        """The value that holds the INT8 weights once the runtime has folded its nodes."""
        whole, shift = None, 0
        for width, packed in zip(plane_widths(bits), encode(weights, bits), strict=True):
            plane = self._plane(self.constant(packed), width)
            if shift:
                plane = self._shift(plane, shift, "LEFT")
            whole = plane if whole is None else self.node("BitwiseOr", whole, plane)
            shift += width
        assert whole is not None
        if weights.size % 8:
            ends = [self.constant(np.array([n], np.int64)) for n in (0, weights.size)]
            whole = self.node("Slice", whole, *ends)
        wide = self.node("Cast", whole, to=ir.DataType.INT32)
        signed = self.node("Sub", wide, self.constant(np.array(1 << (bits - 1), np.int32)))
        narrow = self.node("Cast", signed, to=ir.DataType.INT8)
        shape = self.constant(np.array(weights.shape, np.int64))
        return self.node("Reshape", narrow, shape)

    def _plane(self, packed: ir.Value, width: int) -> ir.Value:
        mask = self.constant(np.array((1 << width) - 1, np.uint8))
        parts = []
        for k in range(8 // width):
            part = packed if k == 0 else self._shift(packed, width * k, "RIGHT")
            parts.append(self.node("BitwiseAnd", part, mask))
        return self.node("Concat", *parts, axis=0)

    def _shift(self, value: ir.Value, by: int, direction: str) -> ir.Value:
        return self.node(
            "BitShift", value, self.constant(np.array(by, np.uint8)), direction=direction
        )
