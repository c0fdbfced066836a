"""The certificate: what the runtime really executes, read from its own optimized graph.

Works on any ONNX file. Matrix nodes (Conv, ConvTranspose, Gemm, MatMul) of the file are found again
in the graph that onnxruntime made of it at its default options: by node name, by output, or by the
name of the weights, whichever the fusion kept.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import shape_inference

from mpq.policy import LayerChoice
from mpq.target import ONNXRUNTIME_CPU, get_target, this_target

from . import meta, runtime
from .form import INT4, NEEDS
from .reasons import Wiring, saturating, why_float

INTEGER_OPS = frozenset({
    *("QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"),
    *("ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"),
})  # fmt: skip
FLOAT_OPS = frozenset({
    *("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose"),
    *("Gemm", "FusedGemm", "MatMul", "FusedMatMul"),
})  # fmt: skip
MATRIX = INTEGER_OPS | FLOAT_OPS
_FOLLOWERS = ("Relu", "Clip", "Max", "QuantizeLinear")
_NCHWC = "_nchwc"  # the runtime renames a Conv in its blocked layout: <output>_nchwc
_SUFFIX = re.compile(r"(_token_\d+|/\w*Fusion\w*/?|_quant)+$")


@dataclass(frozen=True, slots=True)
class LayerCertificate:
    """One matrix node.

    Args:
        name: node name, the module path in files of mpq.
        asked: `W4A8` or `W4A8 dynamic` from the policy, `-` where there is none.
        stored: element type of the weights in the file.
        executed: op type in the optimized graph.
        integer: whether that is an integer kernel.
        macs: multiply-accumulates per image.
        broken: whether that is not what was asked.
        reason: why it runs in float, or what is broken.
    """

    name: str
    asked: str
    stored: str
    executed: str
    integer: bool
    macs: int
    broken: bool = False
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a file does in the runtime.

    Args:
        layers: one row per matrix node.
        boundaries: QuantizeLinear and DequantizeLinear nodes on activations that really run.
        operators: count of each op type in the optimized graph.
        runtime: version of onnxruntime that was asked.
        opset: of the file.
        bytes: size of the file.
        needs: the oldest runtime that the file says it runs on; empty where it says nothing.
        target: the kind of CPU that it was judged for.
        notes: what else to know before it is used.
    """

    layers: tuple[LayerCertificate, ...]
    boundaries: int
    operators: dict[str, int]
    runtime: str
    opset: int
    bytes: int
    needs: str = ""
    target: str = ONNXRUNTIME_CPU.name
    notes: tuple[str, ...] = ()

    @property
    def integer_macs_fraction(self) -> float:
        """Share of the multiply-accumulates that integer kernels execute, 0 to 1."""
        total = sum(row.macs for row in self.layers)
        return sum(row.macs for row in self.layers if row.integer) / total if total else 0.0

    def broken(self) -> list[LayerCertificate]:
        """Layers that do not run as they were asked to."""
        return [row for row in self.layers if row.broken]

    def to_json(self) -> str:
        """The contents of `certificate.json`."""
        data = {"integer_macs_fraction": round(self.integer_macs_fraction, 6), **asdict(self)}
        return json.dumps(data, indent=1)


@dataclass(frozen=True, slots=True)
class _Execution:
    """What became of a matrix node.

    Args:
        op: op type in the optimized graph.
        decoding: its weights are dequantized at every run.
        index: of the node in the optimized graph.
    """

    op: str = ""
    decoding: bool = False
    index: int = -1


def certify(
    model: bytes | Path,
    choices: Mapping[str, LayerChoice] | None = None,
    macs: Mapping[str, int] | None = None,
    target: str | None = None,
) -> Certificate:
    """Ask onnxruntime what it makes of a file.

    Args:
        model: the file or its bytes.
        choices: the decisions by layer, to say what was asked and what is broken. None: those of
            the policy inside the file, if there is one.
        macs: multiply-accumulates of an image by layer, where they are known; they are inferred
            from the shapes in the file otherwise.
        target: the kind of CPU to judge for. None: that of this computer.

    Raises:
        ExportError: the runtime cannot load the file.
        PolicyError: the policy inside the file cannot be read or is not that of its layers.
        UsageError: there is no such file.
    """
    cpu = this_target() if target is None else get_target(target)
    optimized = runtime.optimized_model(model)
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    roots = _constant_roots(proto.graph)
    layers = [n for n in proto.graph.node if n.op_type in MATRIX and _weight(n) in roots]
    if choices is None:
        choices = _inside(proto, [n.name for n in layers])
    runs, shapes, known = _Runs(optimized.graph), _shapes(proto), macs or {}
    told = {p.key: p.value for p in proto.metadata_props}
    wiring = Wiring(proto.graph)
    readers = {name: node for node in proto.graph.node for name in node.input}
    producers = {name: node for node in proto.graph.node for name in node.output}
    rows = [
        _row(
            node,
            roots[_weight(node)],
            runs.find(node, readers, producers),
            known.get(node.name) or _macs(node, roots[_weight(node)], shapes),
            choices.get(node.name),
            wiring,
            decoding_asked=INT4 in told,
        )
        for node in layers
    ]
    return Certificate(
        tuple(rows),
        _boundaries(optimized.graph),
        dict(sorted(Counter(n.op_type for n in optimized.graph.node).items())),
        runtime.version(),
        next((o.version for o in proto.opset_import if not o.domain), 0),
        len(model) if isinstance(model, bytes) else model.stat().st_size,
        told.get(NEEDS, ""),
        cpu.name,
        saturating(
            {r.name: roots[_weight(n)] for r, n in zip(rows, layers, strict=True) if r.integer}, cpu
        ),
    )


def executed_nodes(model: bytes, optimized: onnx.ModelProto) -> dict[str, int]:
    """The index in the runtime's optimized graph of each named matrix node of a file."""
    graph = onnx.load_from_string(model).graph
    runs, roots = _Runs(optimized.graph), _constant_roots(graph)
    readers = {name: node for node in graph.node for name in node.input}
    producers = {name: node for node in graph.node for name in node.output}
    found = {
        n.name: runs.find(n, readers, producers).index
        for n in graph.node
        if n.op_type in MATRIX and n.name and _weight(n) in roots
    }
    return {name: index for name, index in found.items() if index >= 0}


def _inside(proto: onnx.ModelProto, names: list[str]) -> dict[str, LayerChoice]:
    policy = meta.from_metadata({p.key: p.value for p in proto.metadata_props}, "the file")
    return policy.resolve(names) if policy else {}


def _row(
    node: onnx.NodeProto,
    weight: onnx.TensorProto,
    run: _Execution,
    macs: int,
    choice: LayerChoice | None,
    wiring: Wiring,
    *,
    decoding_asked: bool,
) -> LayerCertificate:
    integer = run.op in INTEGER_OPS
    asked, broken, reason = "-", False, ""
    if choice is not None:
        w, a = choice.weight_bits, choice.activation_bits
        asked = f"W{w or 32}A{a or 32}{' dynamic' if choice.dynamic else ''}"
        promised, reason = _promise(node, w, a)
        broken = promised != integer or run.decoding
        if broken and decoding_asked and weight.data_type == onnx.TensorProto.INT4:
            broken = False
            reason = "stored for other runtimes, as --int4-format dq asks"
        elif broken:
            reason = f"asked for {asked}, but the runtime executes {run.op or 'no such node'}"
    if not integer and (broken or not reason):
        reason += (": " if reason else "") + why_float(node, wiring)
    if run.decoding:
        reason += (", " if reason else "") + "its weights dequantized at every run"
    return LayerCertificate(
        name=node.name or node.output[0],
        asked=asked,
        stored=onnx.TensorProto.DataType.Name(weight.data_type),
        executed=run.op,
        integer=integer,
        macs=macs,
        broken=broken,
        reason=reason,
    )


def _promise(node: onnx.NodeProto, w: int | None, a: int | None) -> tuple[bool, str]:
    """Whether integers are promised, and if not, why."""
    support = ONNXRUNTIME_CPU.support(w, a)
    if support.integer and node.op_type == "ConvTranspose":
        return False, "no integer kernel for transposed convolution"
    return support.integer, support.reason


def _weight(node: onnx.NodeProto) -> str:
    """Name of the weights of a matrix node."""
    index = 3 if node.op_type in ("QLinearConv", "QGemm", "QLinearMatMul") else 1
    return str(node.input[index])


def _constant_roots(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Each constant value's stored tensor, through the decoding in between."""
    roots = {t.name: t for t in graph.initializer}
    for node in graph.node:
        inputs = [i for i in node.input if i]
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            roots[node.output[0]] = node.attribute[0].t
        elif inputs and all(i in roots for i in inputs):
            roots.update((out, roots[inputs[0]]) for out in node.output)
    return roots


def _shapes(proto: onnx.ModelProto) -> dict[str, list[int]]:
    """Shapes of all values for one image; a size that cannot be inferred counts as 1."""
    single = onnx.ModelProto()
    single.CopyFrom(proto)
    for value in single.graph.input:
        if value.type.tensor_type.shape.dim:
            # With a number for the batch, sizes that the graph computes from it can be followed.
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(single, data_prop=True).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {v.name: [max(d.dim_value, 1) for d in v.type.tensor_type.shape.dim] for v in values}


def _macs(node: onnx.NodeProto, weight: onnx.TensorProto, shapes: dict[str, list[int]]) -> int:
    if node.op_type == "ConvTranspose":
        positions = shapes.get(node.input[0], [])[2:]
    elif "Conv" in node.op_type:
        positions = shapes.get(node.output[0], [])[2:]
    else:
        positions = shapes.get(node.output[0], [])[1:-1]
    count: int = math.prod(weight.dims)
    return count * math.prod(positions)


def _boundaries(optimized: onnx.GraphProto) -> int:
    constants = _constant_roots(optimized)
    return sum(
        n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.input[0] not in constants
        for n in optimized.node
    )


class _Runs:
    """Matrix nodes of the optimized graph by every name that a fusion may have kept.

    Names of nodes and of values are kept apart: mpq's values are called `a`, `b`, and so may layers
    be.
    """

    def __init__(self, optimized: onnx.GraphProto) -> None:
        producers = {out: n for n in optimized.node for out in n.output}
        indexed = [(i, n) for i, n in enumerate(optimized.node) if n.op_type in MATRIX]
        nodes = [n for _, n in indexed]
        weights = Counter(_weight(n) for n in nodes)
        self.by_node: dict[str, _Execution] = {}
        self.by_value: dict[str, _Execution] = {}
        runs = [(n, _Execution(n.op_type, _decoding(n, producers), i)) for i, n in indexed]
        for node, run in runs:
            self.by_node.setdefault(node.name, run)
            for out in node.output:
                self.by_value[out] = run
            self.by_value.setdefault(node.name.removesuffix(_NCHWC), run)
            if weights[_weight(node)] == 1:
                self.by_value.setdefault(_weight(node), run)
        for node, run in runs:
            self.by_node.setdefault(_SUFFIX.sub("", node.name), run)

    def find(
        self,
        node: onnx.NodeProto,
        readers: dict[str, onnx.NodeProto],
        producers: dict[str, onnx.NodeProto],
    ) -> _Execution:
        """What became of `node` of the file; an empty op type if it is nowhere."""
        if node.name and node.name in self.by_node:
            return self.by_node[node.name]
        values = [node.output[0]]
        while (after := readers.get(values[-1])) is not None and after.op_type in _FOLLOWERS:
            values.append(after.output[0])
        weight = _weight(node)
        while weight in producers and producers[weight].input:
            values.append(weight)
            weight = producers[weight].input[0]
        values.append(weight)
        return next((self.by_value[v] for v in values if v in self.by_value), _Execution())


def _decoding(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether a float node's weights come out of a DequantizeLinear that was not folded."""
    name = _weight(node)
    while node.op_type in FLOAT_OPS and name in producers and producers[name].input:
        if producers[name].op_type == "DequantizeLinear":
            return True
        name = producers[name].input[0]
    return False
