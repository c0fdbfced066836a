"""Matrix nodes of a file found again in the graph that onnxruntime made of it, and how they run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import onnx

from mpq.layers import Operation

from .operators import MOVES

INTEGER_OPS = frozenset({
    *("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"),
    *("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"),
})  # fmt: skip
FLOAT_OPS = frozenset({
    *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"),
    *("Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
})  # fmt: skip
MATRIX = INTEGER_OPS | FLOAT_OPS
_FOLLOWERS = frozenset({
    *("Relu", "Clip", "Max", "QuantizeLinear"),
    *("Sigmoid", "HardSigmoid", "Tanh", "LeakyRelu"),  # a float Conv takes these along
})  # fmt: skip
_MOVES = MOVES | {"ReorderInput", "Identity", "SpaceToDepth"}
_WIDE = (onnx.TensorProto.UINT16, onnx.TensorProto.INT16)
_NCHWC = "_nchwc"  # the runtime renames a Conv in its blocked layout: <output>_nchwc
_SUFFIX = re.compile(r"(_token_\d+|/\w*Fusion\w*/?|_quant)+$")


@dataclass(frozen=True, slots=True)
class Execution:
    """What became of a matrix node.

    Args:
        op: op type in the optimized graph.
        decoding: its weights are dequantized at every run.
        rounded: bits of the grid that a float node's input lies on; 0 where it lies on none.
        index: of the node in the optimized graph.
    """

    op: str = ""
    decoding: bool = False
    rounded: int = 0
    index: int = -1


def weight_of(node: onnx.NodeProto) -> str:
    """Name of the weights of a matrix node."""
    index = 3 if node.op_type in ("QLinearConv", "QGemm", "QLinearMatMul") else 1
    return str(node.input[index])


def constant_roots(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Each constant value's stored tensor, through the decoding in between."""
    roots = {t.name: t for t in graph.initializer}
    for node in graph.node:
        inputs = [i for i in node.input if i]
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            roots[node.output[0]] = node.attribute[0].t
        elif inputs and all(i in roots for i in inputs):
            roots.update((out, roots[inputs[0]]) for out in node.output)
    return roots


def operation_of(node: onnx.NodeProto, constants: Container[str] = ()) -> Operation:
    """What a matrix node computes, as `Target.support` asks for it."""
    constant = all(name in constants for name in node.input if name)
    if "Conv" not in node.op_type:
        return Operation("linear", constant=constant)
    attributes = {a.name: a for a in node.attribute}
    steps = {name: max(attributes[name].ints, default=1) if name in attributes else 1
             for name in ("strides", "dilations")}  # fmt: skip
    return Operation(
        "conv_transpose" if "Transpose" in node.op_type else "conv",
        grouped="group" in attributes and attributes["group"].i > 1,
        strided=steps["strides"] > 1,
        dilated=steps["dilations"] > 1,
        constant=constant,
    )


def executions(graph: onnx.GraphProto, optimized: onnx.GraphProto) -> list[Execution]:
    """What became of each matrix node of a file that has constant weights, in their order."""
    runs, roots = _Runs(optimized), constant_roots(graph)
    readers = {name: node for node in graph.node for name in node.input}
    producers = {name: node for node in graph.node for name in node.output}
    layers = (n for n in graph.node if n.op_type in MATRIX and weight_of(n) in roots)
    return [runs.find(node, readers, producers) for node in layers]


class _Runs:
    """Matrix nodes of the optimized graph by every name that a fusion may have kept.

    Names of nodes and of values are kept apart: mpq's values are called `a`, `b`, and so may layers
    be.
    """

    def __init__(self, optimized: onnx.GraphProto) -> None:
        producers = {out: n for n in optimized.node for out in n.output}
        indexed = [(i, n) for i, n in enumerate(optimized.node) if n.op_type in MATRIX]
        nodes = [n for _, n in indexed]
        weights = Counter(weight_of(n) for n in nodes)
        self.by_node: dict[str, Execution] = {}
        self.by_value: dict[str, Execution] = {}
        types = {t.name: t.data_type for t in optimized.initializer}
        runs = [
            (n, Execution(n.op_type, _decoding(n, producers), _rounded(n, producers, types), i))
            for i, n in indexed
        ]
        for node, run in runs:
            self.by_node.setdefault(node.name, run)
            for out in node.output:
                self.by_value[out] = run
            self.by_value.setdefault(node.name.removesuffix(_NCHWC), run)
            if weights[weight_of(node)] == 1:
                self.by_value.setdefault(weight_of(node), run)
        for node, run in runs:
            self.by_node.setdefault(_SUFFIX.sub("", node.name), run)

    def find(
        self,
        node: onnx.NodeProto,
        readers: dict[str, onnx.NodeProto],
        producers: dict[str, onnx.NodeProto],
    ) -> Execution:
        """What became of `node` of the file; an empty op type if it is nowhere."""
        if node.name and node.name in self.by_node:
            return self.by_node[node.name]
        values = [node.output[0]]
        while (after := readers.get(values[-1])) is not None and after.op_type in _FOLLOWERS:
            values.append(after.output[0])
        weight = weight_of(node)
        while weight in producers and producers[weight].input:
            values.append(weight)
            weight = producers[weight].input[0]
        values.append(weight)
        return next((self.by_value[v] for v in values if v in self.by_value), Execution())


def _decoding(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a float node's weights come out of a DequantizeLinear that was not folded."""
    name = weight_of(node)
    while node.op_type in FLOAT_OPS and name in producers and producers[name].input:
        if producers[name].op_type == "DequantizeLinear":
            return True
        name = producers[name].input[0]
    return False


def _rounded(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], types: dict[str, int]
) -> int:
    """Bits of the grid to which what a float node reads was rounded just before; else 0."""
    name = node.input[0]
    while node.op_type in FLOAT_OPS and name in producers:
        before = producers[name]
        if before.op_type == "DequantizeLinear" and len(before.input) > 2:
            return 16 if types.get(before.input[2]) in _WIDE else 8
        if before.op_type not in _MOVES:
            return 0
        name = before.input[0]
    return 0
