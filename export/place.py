"""Placement passes on the ONNX graph: give each operation the form that the runtime runs best.

- A mean over space becomes GlobalAveragePool: it has an integer kernel, ReduceMean has none.
- A hard-sigmoid between integers becomes an addition (`gates.py`).
- What follows the interleaving of a transposed convolution moves before it (`upsample.py`).
- Operations that only move values run on 8-bit integers: their DequantizeLinear sinks below them.
  Of 16 bits runtimes lack some (MaxPool, Pad), and the float layer behind them gains nothing.
- A float layer between quantized neighbours is guarded: onnxruntime would otherwise give it 8-bit
  weights of its own. Its WeightBiasQuantization pass matches a Conv or Gemm whose output reaches a
  QuantizeLinear directly or through Relu or Clip, and its QDQPropagation pass first moves that
  QuantizeLinear up through moves. A Max behind the layer is outside the pattern.
- Slices along one axis after another become one.
- A strided stem works on blocks of pixels (`stem.py`).
- A per-channel Gemm gets its weight zero points written out, which old runtimes need to run it and
  new ones to fuse it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from .gates import hard_sigmoids
from .stem import block_stem
from .upsample import lift_quantizers

MOVES = frozenset({
    *("Reshape", "Flatten", "Slice", "Gather", "Transpose", "MaxPool", "Squeeze", "Unsqueeze"),
    *("Split", "Pad", "DepthToSpace"),
})  # fmt: skip
GUARDED = frozenset({"Conv", "ConvTranspose", "Gemm"})
TRANSPARENT = MOVES | {"Identity", "Relu", "Clip"}
LOWEST = np.float32(-3.4e38)


def place(model: ir.Model) -> int:
    """Run all placement passes; return the number of rewrites."""
    graph = model.graph
    steps = (_pool, _join_slices, lift_quantizers, _sink, hard_sigmoids, _guard)
    count = sum(step(graph) for step in (*steps, _gemm_zero_points, block_stem))
    common.RemoveUnusedNodesPass()(model)
    return count


def constant(graph: ir.Graph, array: NDArray[Any] | np.generic) -> ir.Value:
    """An initializer with the given contents; slimming merges equal ones."""
    tensor = ir.tensor(np.asarray(array))
    value = ir.val(f"const.{len(graph.initializers)}", const_value=tensor)
    while value.name in graph.initializers:
        value.name = f"{value.name}_"
    graph.register_initializer(value)
    return value


def _before(graph: ir.Graph, anchor: ir.Node, new: ir.Node) -> ir.Node:
    graph.insert_before(anchor, new)
    return new


def _after(graph: ir.Graph, anchor: ir.Node, new: ir.Node) -> ir.Node:
    graph.insert_after(anchor, new)
    return new


def _ints(value: ir.Value | None) -> list[int] | None:
    """The contents of a constant, which the exporter may have put behind a Reshape."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return None
    return [int(v) for v in value.const_value.numpy().reshape(-1)]


def _pool(graph: ir.Graph) -> int:
    count = 0
    for node in list(graph):
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, axes = node.inputs[0], _ints(node.inputs[1])
        keep = node.attributes.get("keepdims")
        if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
            continue
        if sorted(a % 4 for a in axes) != [2, 3] or (keep is not None and keep.as_int() != 1):
            continue
        new = _before(graph, node, ir.node("GlobalAveragePool", [x]))
        _take_over(node.outputs[0], new.outputs[0])
        graph.remove(node, safe=True)
        count += 1
    return count


def _join_slices(graph: ir.Graph) -> int:
    """Make one Slice of two that follow each other along different axes."""
    count = 0
    for node in list(graph):
        before = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] else None
        if before is None or before.op_type != "Slice" or len(before.outputs[0].uses()) != 1:
            continue
        first, second = _slice_arguments(before), _slice_arguments(node)
        if first is None or second is None or set(first[2]) & set(second[2]):
            continue
        node.replace_input_with(0, before.inputs[0])
        node.resize_inputs(5)
        for index, (a, b) in enumerate(zip(first, second, strict=True)):
            node.replace_input_with(index + 1, constant(graph, np.array([*a, *b], np.int64)))
        graph.remove(before, safe=True)
        count += 1
    return count


def _slice_arguments(node: ir.Node) -> list[list[int]] | None:
    """Starts, ends, axes (from the front) and steps of a Slice, if all are written out."""
    found = [_ints(value) for value in node.inputs[1:]]
    if len(found) == 3 and found[0] is not None:
        found.append([1] * len(found[0]))
    known = [ints for ints in found if ints is not None]
    return known if len(known) == 4 and min(known[2]) >= 0 else None


def _take_over(old: ir.Value, new: ir.Value) -> None:
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)


def _sink(graph: ir.Graph) -> int:
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
    mode = move.attributes.get("mode")
    if mode is not None and mode.as_string() != "constant":
        return False
    fill = move.inputs[2] if len(move.inputs) > 2 else None
    if fill is None:
        return True
    return fill.const_value is not None and float(fill.const_value.numpy()) == 0.0


def _sink_one(graph: ir.Graph, dq: ir.Node, move: ir.Node) -> list[ir.Node]:
    scale, zero = dq.inputs[1], dq.inputs[2]
    move.replace_input_with(0, dq.inputs[0])
    if move.op_type == "Pad":
        if len(move.inputs) < 3:
            move.resize_inputs(3)
        move.replace_input_with(2, zero)
    below = []
    for out in move.outputs:
        new = _after(graph, move, ir.node("DequantizeLinear", [out, scale, zero]))
        new.outputs[0].shape, new.outputs[0].type = out.shape, out.type
        out.type = ir.TensorType(ir.DataType.UINT8)
        readers = [(n, i) for n, i in out.uses() if n is not new]
        for reader, i in readers:
            reader.replace_input_with(i, new.outputs[0])
        below.append(new)
    return below


def _guard(graph: ir.Graph) -> int:
    """Keep the runtime from quantizing layers that the policy keeps in float or 16 bits."""
    count = 0
    for node in list(graph):
        if node.op_type not in GUARDED or _has_integer_weights(node):
            continue
        out = node.outputs[0]
        for reader, index in list(out.uses()):
            if not _reaches_quantize(reader):
                continue
            relu = reader.op_type == "Relu"
            bound = constant(graph, np.float32(0) if relu else LOWEST)
            guarded = _before(graph, reader, ir.node("Max", [out, bound])).outputs[0]
            if relu:
                _take_over(reader.outputs[0], guarded)
                graph.remove(reader, safe=True)
            else:
                guarded.shape, guarded.type = out.shape, out.type
                reader.replace_input_with(index, guarded)
            count += 1
    return count


def _has_integer_weights(node: ir.Node) -> bool:
    weight = node.inputs[1]
    producer = None if weight is None else weight.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"


def _reaches_quantize(node: ir.Node) -> bool:
    """Whether a node is a QuantizeLinear, or lets the runtime move one up to its input."""
    if node.op_type == "QuantizeLinear":
        return True
    readers = (n for out in node.outputs for n, _ in out.uses())
    return node.op_type in TRANSPARENT and any(_reaches_quantize(n) for n in readers)


def _gemm_zero_points(graph: ir.Graph) -> int:
    count = 0
    for node in graph:
        if node.op_type != "Gemm" or not _has_integer_weights(node):
            continue
        weight = node.inputs[1]
        dq = weight.producer() if weight is not None else None
        assert dq is not None
        scale = dq.inputs[1]
        if len(dq.inputs) > 2 or scale is None or scale.const_value is None:
            continue
        dq.resize_inputs(3)
        dq.replace_input_with(2, constant(graph, np.zeros_like(scale.const_value.numpy(), np.int8)))
        count += 1
    return count
