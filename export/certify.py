"""The certificate: what the runtime really executes, read from its own optimized graph.

Works on any ONNX file. Matrix nodes (Conv, ConvTranspose, Gemm, MatMul) of the file are found again
in the graph that onnxruntime made of it at its default options: by node name, by output, or by the
name of the weights, whichever the fusion kept.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import shape_inference

from mpq.policy import LayerChoice
from mpq.target import ONNXRUNTIME_CPU, ROUNDED, get_target, this_target

from . import meta, runtime
from .executed import INTEGER_OPS, MATRIX, Execution, Runs, constant_roots, weight_of
from .form import INT4, NEEDS
from .reasons import Wiring, saturating, why_float


@dataclass(frozen=True, slots=True)
class LayerCertificate:
    """One matrix node.

    Args:
        name: node name, the module path in files of mpq.
        asked: `W4A8`, `W4A8 dynamic` or `W16A16 exact` from the policy, `-` where there is none.
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
    cpu = get_target(target)
    optimized = runtime.optimized_model(model)
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    roots = constant_roots(proto.graph)
    layers = [n for n in proto.graph.node if n.op_type in MATRIX and weight_of(n) in roots]
    if choices is None:
        choices = _inside(proto, [n.name for n in layers])
    runs, shapes, known = Runs(optimized.graph), _shapes(proto), macs or {}
    told = {p.key: p.value for p in proto.metadata_props}
    wiring = Wiring(proto.graph)
    readers = {name: node for node in proto.graph.node for name in node.input}
    producers = {name: node for node in proto.graph.node for name in node.output}
    rows = [
        _row(
            node,
            roots[weight_of(node)],
            runs.find(node, readers, producers),
            known.get(node.name) or _macs(node, roots[weight_of(node)], shapes),
            choices.get(node.name),
            wiring,
            decoding_asked=told.get(INT4) == "dq",
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
            {r.name: roots[weight_of(n)] for r, n in zip(rows, layers, strict=True) if r.integer},
            cpu,
        ),
    )


def saturating_here(model: bytes | Path) -> tuple[str, ...]:
    """A warning if a file has weights that this computer's CPU cannot add exactly.

    Raises as `certify`.
    """
    return certify(model).notes if this_target().saturates else ()


def executed_nodes(model: bytes, optimized: onnx.ModelProto) -> dict[str, int]:
    """The index in the runtime's optimized graph of each named matrix node of a file."""
    graph = onnx.load_from_string(model).graph
    runs, roots = Runs(optimized.graph), constant_roots(graph)
    readers = {name: node for node in graph.node for name in node.input}
    producers = {name: node for node in graph.node for name in node.output}
    found = {
        n.name: runs.find(n, readers, producers).index
        for n in graph.node
        if n.op_type in MATRIX and n.name and weight_of(n) in roots
    }
    return {name: index for name, index in found.items() if index >= 0}


def _inside(proto: onnx.ModelProto, names: list[str]) -> dict[str, LayerChoice]:
    policy = meta.from_metadata({p.key: p.value for p in proto.metadata_props}, "the file")
    return policy.resolve(names) if policy else {}


def _row(
    node: onnx.NodeProto,
    weight: onnx.TensorProto,
    run: Execution,
    macs: int,
    choice: LayerChoice | None,
    wiring: Wiring,
    *,
    decoding_asked: bool,
) -> LayerCertificate:
    integer = run.op in INTEGER_OPS
    asked, broken, reason = "-", False, ""
    if choice is not None:
        asked = choice.asked
        promised, reason = _promise(node, choice)
        if choice.exact and run.rounded:
            reason += f"; {ROUNDED.format(run.rounded)}"
        unrounded = choice.exact and not run.rounded
        broken = promised != integer or run.decoding or unrounded
        if broken and decoding_asked and weight.data_type == onnx.TensorProto.INT4:
            broken = False
            reason = "stored for other runtimes, as --int4-format dq asks"
        elif broken:
            what = "rounds its input nowhere" if unrounded and run.op else _executes(run)
            reason = f"asked for {asked}, but the runtime {what}"
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


def _executes(run: Execution) -> str:
    return f"executes {run.op or 'no such node'}"


def _promise(node: onnx.NodeProto, choice: LayerChoice) -> tuple[bool, str]:
    """Whether integers are promised, and if not, why."""
    support = ONNXRUNTIME_CPU.support(choice.weight_bits, choice.activation_bits)
    if support.integer and node.op_type == "ConvTranspose":
        return False, "no integer kernel for transposed convolution"
    return support.integer, support.reason


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
    constants = constant_roots(optimized)
    return sum(
        n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.input[0] not in constants
        for n in optimized.node
    )
