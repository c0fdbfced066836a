"""Placement passes on the ONNX graph: give each operation the form that the runtime runs best.

- Local rewrites (`rules.py`), a hard-sigmoid between integers as an addition (`gates.py`).
- What follows the interleaving of a transposed convolution moves before it (`upsample.py`).
- Operations that only move values run on 8-bit integers: their DequantizeLinear sinks below them.
  Of 16 bits runtimes lack some (MaxPool, Pad), and the float layer after them gains nothing.
- A float layer between quantized neighbours is guarded: onnxruntime would otherwise give it 8-bit
  weights of its own. Its WeightBiasQuantization pass matches a Conv or Gemm whose output reaches a
  QuantizeLinear directly or through Relu or Clip, and its QDQPropagation pass first moves that
  QuantizeLinear up through moves. A Max after the layer is outside the pattern.
- So is an integer Gemm or MatMul before a Relu or Clip that no QuantizeLinear absorbs: onnxruntime
  looks through a lone clamp for a QuantizeLinear, and leaves the layer in float without one.
- A strided stem works on blocks of pixels (`stem.py`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from .edit import Step, Writer, run, take_over, weight_decoding
from .gates import HARD_SIGMOID
from .operators import MOVES
from .rules import GEMM_ZERO_POINTS, GLOBAL_POOL, JOIN_SLICES
from .stem import block_stem
from .upsample import lift_quantizers

GUARDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
TRANSPARENT = MOVES | {"Identity", "Relu", "Clip"}
LOWEST = np.float32(-3.4e38)


def place(model: ir.Model) -> int:
    """Take all placement steps; return the number of rewrites."""
    count = run(model, STEPS)
    common.RemoveUnusedNodesPass()(model)
    return count


def sink(graph: ir.Graph) -> int:
    """Move each DequantizeLinear below the moves that read it, to a fixed point."""
    count = 0
    work = [n for n in graph if n.op_type == "DequantizeLinear"]
    while work:
        dq = work.pop()
        zero = dq.inputs[2] if len(dq.inputs) > 2 else None
        if dq.inputs[0] is None or dq.inputs[0].is_initializer():
            continue
        if zero is None or zero.const_value is None or zero.const_value.dtype != ir.DataType.UINT8:
            continue
        for move, index in list(dq.outputs[0].uses()):
            if index == 0 and _movable(move):
                work.extend(_sink_one(graph, dq, move))
                count += 1
    return count


def _movable(move: ir.Node) -> bool:
    if any(out.is_graph_output() for out in move.outputs):
        return False  # the network answers in floats
    if move.op_type == "MaxPool":
        return len(move.outputs) == 1  # the second are indices
    if move.op_type != "Pad":
        return move.op_type in MOVES
    fill = _fill(move)
    if fill == -np.inf:
        return all(reader.op_type == "MaxPool" for reader, _ in move.outputs[0].uses())
    return fill == 0


def _fill(pad: ir.Node) -> float | None:
    """What a Pad puts around its input; None where that is computed. Other modes need nothing."""
    fill = pad.inputs[2] if len(pad.inputs) > 2 else None
    if fill is None:
        return 0.0
    return None if fill.const_value is None else float(fill.const_value.numpy())


def _sink_one(graph: ir.Graph, dq: ir.Node, move: ir.Node) -> list[ir.Node]:
    scale, zero = dq.inputs[1], dq.inputs[2]
    move.replace_input_with(0, dq.inputs[0])
    if move.op_type == "Pad" and move.attributes.get_string("mode", "constant") == "constant":
        least = _fill(move) == -np.inf  # the least integer never wins a maximum
        fill = Writer(graph, move).constant(np.uint8(0)) if least else zero
        if len(move.inputs) < 3:
            move.resize_inputs(3)
        move.replace_input_with(2, fill)
    below = []
    for out in move.outputs:
        new = ir.node("DequantizeLinear", [out, scale, zero])
        graph.insert_after(move, new)
        new.outputs[0].shape, new.outputs[0].type = out.shape, out.type
        out.type = ir.TensorType(ir.DataType.UINT8)
        readers = [(n, i) for n, i in out.uses() if n is not new]
        for reader, i in readers:
            reader.replace_input_with(i, new.outputs[0])
        below.append(new)
    return below


def guard(graph: ir.Graph) -> int:
    """Put a Max behind layers that the runtime would take for others; return how many times."""
    count = 0
    for node in list(graph):
        floats = node.op_type in GUARDED and weight_decoding(node) is None
        for reader, index in list(node.outputs[0].uses()):
            if _reaches_quantize(reader) if floats else _hides(node, reader):
                _put_max(graph, reader, index)
                count += 1
    return count


def _put_max(graph: ir.Graph, reader: ir.Node, index: int) -> None:
    """A Max in the place of a Relu, or before any other reader."""
    relu, write, out = reader.op_type == "Relu", Writer(graph, reader), reader.inputs[index]
    assert out is not None
    guarded = write.node("Max", out, write.constant(np.float32(0) if relu else LOWEST))
    if relu:
        take_over(reader.outputs[0], guarded)
        graph.remove(reader, safe=True)
    else:
        guarded.shape, guarded.type = out.shape, out.type
        reader.replace_input_with(index, guarded)


def _hides(node: ir.Node, clamp: ir.Node) -> bool:
    """Whether a Relu or Clip keeps the runtime from an integer layer whose answer is floats."""
    if node.op_type not in ("Gemm", "MatMul") or clamp.op_type not in ("Relu", "Clip"):
        return False
    read = None if node.inputs[0] is None else node.inputs[0].producer()
    decoded = read is not None and read.op_type == "DequantizeLinear" and weight_decoding(node)
    readers = list(clamp.outputs[0].uses())
    if not decoded or len(node.outputs[0].uses()) != 1 or len(readers) != 1:
        return False
    return not _absorbs(readers[0][0], clamp)


def _absorbs(quantize: ir.Node, clamp: ir.Node) -> bool:
    """Whether the saturation of a QuantizeLinear does what a clamp before it does."""
    grid = [v.const_value for v in quantize.inputs[1:] if v is not None and v.const_value]
    if quantize.op_type != "QuantizeLinear" or len(grid) != 2:
        return False
    scale, zero = (tensor.numpy() for tensor in grid)
    ends = np.iinfo(zero.dtype)
    low, high = (float((end - float(zero)) * scale) for end in (ends.min, ends.max))
    least = 0.0 if clamp.op_type == "Relu" else _bound(clamp, 1, -np.inf)
    most, slack = _bound(clamp, 2, np.inf), 1e-3 * float(scale)
    return low >= least - slack and high <= most + slack


def _bound(clamp: ir.Node, index: int, none: float) -> float:
    """A bound of a Clip; NaN, which nothing is within, where it is computed."""
    value = clamp.inputs[index] if index < len(clamp.inputs) else None
    if value is None:
        return none
    return np.nan if value.const_value is None else float(value.const_value.numpy())


def _reaches_quantize(node: ir.Node) -> bool:
    """Whether a node is a QuantizeLinear, or lets the runtime move one up to its input."""
    if node.op_type == "QuantizeLinear":
        return True
    readers = (n for out in node.outputs for n, _ in out.uses())
    return node.op_type in TRANSPARENT and any(_reaches_quantize(n) for n in readers)


STEPS: tuple[Step, ...] = (
    GLOBAL_POOL,
    JOIN_SLICES,
    lift_quantizers,
    sink,
    HARD_SIGMOID,
    guard,
    GEMM_ZERO_POINTS,
    block_stem,
)
"""In this order: rules, and passes over the whole graph."""
