"""Bit-packed weights of any width below 8, unpacked by operations that fold at load.

A `b`-bit weight is stored as the unsigned `u = q + 2^(b-1)`, cut into planes of 4, 2 or 1 bits
(5 = 4 + 1), because those fill bytes evenly. Of a plane of `p` bits, `k = 8/p` values share a byte:
byte `i` holds values `i, i + L, ..., i + (k-1) L` from its low bits up, `L` being the number of
bytes, so that unpacking is a mask and shift for each of `k` parts and one Concat. Layers of one
width are unpacked together, and split afterwards: the nodes that unpack cost 400 to 1,400 bytes,
those that split off a layer 70. Runs on onnxruntime 1.18 or newer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .edit import Writer

Bytes = NDArray[np.uint8]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Widths that fill bytes evenly and add up to `bits`, widest first: 5 = 4 + 1.

    Integers that no type of a file fits are cut into such parts, low bits first.
    """
    return tuple(width for width in (4, 2, 1) if bits & width)


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


def unpack(write: Writer, weights: Sequence[NDArray[np.int8]], bits: int) -> list[ir.Value]:
    """Write the nodes that undo `encode`; their outputs are INT8 once they are folded."""
    flat = np.concatenate([one.reshape(-1) for one in weights])
    whole, shift = None, 0
    for width, packed in zip(plane_widths(bits), encode(flat, bits), strict=True):
        plane = _plane(write, packed, width)
        if shift:
            plane = _shift(write, plane, shift, "LEFT")
        whole = plane if whole is None else write.node("BitwiseOr", whole, plane)
        shift += width
    if flat.size % 8:
        ends = [write.constant(np.array([n], np.int64)) for n in (0, flat.size)]
        whole = write.node("Slice", whole, *ends)
    wide = write.node("Cast", whole, to=ir.DataType.INT32)
    signed = write.node("Sub", wide, write.constant(np.array(1 << (bits - 1), np.int32)))
    parts: Sequence[ir.Value] = [write.node("Cast", signed, to=ir.DataType.INT8)]
    if len(weights) > 1:
        sizes = write.constant(np.array([one.size for one in weights], np.int64))
        split = ir.node("Split", [parts[0], sizes], num_outputs=len(weights))
        write.graph.insert_before(write.anchor, split)
        parts = split.outputs
    shapes = [write.constant(np.array(one.shape, np.int64)) for one in weights]
    return [write.node("Reshape", *pair) for pair in zip(parts, shapes, strict=True)]


def _plane(write: Writer, plane: Bytes, width: int) -> ir.Value:
    packed = write.constant(plane)
    mask = write.constant(np.array((1 << width) - 1, np.uint8))
    parts = []
    for k in range(8 // width):
        part = packed if k == 0 else _shift(write, packed, width * k, "RIGHT")
        parts.append(write.node("BitwiseAnd", part, mask))
    return write.node("Concat", *parts, axis=0)


def _shift(write: Writer, value: ir.Value, by: int, direction: str) -> ir.Value:
    return write.node(
        "BitShift", value, write.constant(np.array(by, np.uint8)), direction=direction
    )
