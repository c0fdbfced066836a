"""The certificate: what the runtime really executes, read from its own optimized graph.

Works on any ONNX file. Matrix nodes (Conv, ConvTranspose, Gemm, MatMul) of the file are found again
in the graph that onnxruntime made of it at its default options: by node name, by output, or by the
name of the weights, whichever the fusion kept. Three promises are held against what is found: the
file stores the widths that were asked for (`stored`), integer layers read their inputs on the grids
that were asked for (`grids`), and the runtime runs as integers what its target has kernels for
(`mpq.target`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnx import shape_inference

from mpq.layers import FloatPart, LayerChoice
from mpq.shown import Shown
from mpq.target import ROUNDED, WIDER, Support, Target
from mpq.targets import get_target, this_target

from . import meta, runtime
from .besides import besides, stored_bytes
from .executed import (
    INTEGER_OPS,
    MATRIX,
    Execution,
    constant_roots,
    executions,
    operation_of,
    weight_of,
)
from .form import INT4, NEEDS
from .grids import UNKNOWN, InputGrid, asked_of_grids, grid_of
from .reasons import Wiring, saturating, why_float
from .stored import Stored, stored_weights

if TYPE_CHECKING:
    from mpq.graph.ir import QuantGraph


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
        stored_bits: width of the weights as their decoding tells it, 32 for floats; 0 where it
            is not known.
    """

    name: str
    asked: str
    stored: str
    executed: str
    integer: bool
    macs: int
    broken: bool = False
    reason: str = ""
    stored_bits: int = 0


@dataclass(frozen=True, slots=True)
class Certificate(Shown):
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
        besides: what else it multiplies, in float: recurrent layers, products of activations.
        stored: bytes of the file by what they are for: `layers`, `besides`, `graph`.
    """

    TABLES = ("certificate_table",)
    layers: tuple[LayerCertificate, ...]
    boundaries: int
    operators: dict[str, int]
    runtime: str
    opset: int
    bytes: int
    needs: str = ""
    target: str = ""
    notes: tuple[str, ...] = ()
    besides: tuple[FloatPart, ...] = ()
    stored: dict[str, int] = field(default_factory=dict)

    @property
    def integer_macs_fraction(self) -> float:
        """Share of all multiply-accumulates that integer kernels execute, 0 to 1."""
        total = sum(row.macs for row in self.layers) + sum(part.macs for part in self.besides)
        return sum(row.macs for row in self.layers if row.integer) / total if total else 0.0

    def broken(self) -> list[LayerCertificate]:
        """Layers that do not run as they were asked to."""
        return [row for row in self.layers if row.broken]

    def to_json(self) -> str:
        """The contents of `certificate.json`."""
        data = {"integer_macs_fraction": round(self.integer_macs_fraction, 6), **asdict(self)}
        return json.dumps(data, indent=1)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a layer was promised to be.

    Args:
        choice: of the policy.
        support: what the target makes of it.
        grid: where it reads its input in the file.
        bits: that were asked of this grid, by all that read it.
    """

    choice: LayerChoice
    support: Support
    grid: InputGrid = UNKNOWN
    bits: int = 0


def certify(
    model: bytes | Path, graph: QuantGraph | None = None, target: str | None = None
) -> Certificate:
    """Ask onnxruntime what it makes of a file.

    Args:
        model: the file or its bytes.
        graph: what it was made from, whose policy says what was asked. None: the policy inside the
            file says it, if there is one.
        target: the kind of CPU to judge for. None: that of this computer.

    Raises:
        ExportError: the runtime cannot load the file.
        PolicyError: the policy inside the file cannot be read or is not that of its layers.
        UsageError: there is no such file.
    """
    cpu = get_target(target)
    optimized = runtime.optimized_model(model)
    proto = onnx.load_from_string(model) if isinstance(model, bytes) else onnx.load(model)
    wiring = Wiring(proto.graph)
    roots = constant_roots(proto.graph)
    layers = [n for n in proto.graph.node if n.op_type in MATRIX and weight_of(n) in roots]
    asked = _inside(proto, layers, cpu) if graph is None else _of_graph(graph, cpu)
    promises = _promises(layers, asked, wiring)
    macs = {} if graph is None else {name: layer.macs for name, layer in graph.layers.items()}
    found, shapes = executions(proto.graph, optimized.graph), _shapes(proto)
    metadata = {p.key: p.value for p in proto.metadata_props}
    rows = [
        _row(
            node,
            stored_weights(node, roots[weight_of(node)], wiring),
            run,
            macs.get(node.name) or _macs(node, roots[weight_of(node)], shapes),
            promise,
            wiring,
            decoding_asked=metadata.get(INT4) == "dq",
        )
        for node, run, promise in zip(layers, found, promises, strict=True)
    ]
    size = len(model) if isinstance(model, bytes) else model.stat().st_size
    return Certificate(
        tuple(rows),
        _boundaries(optimized.graph),
        dict(sorted(Counter(n.op_type for n in optimized.graph.node).items())),
        runtime.version(),
        next((o.version for o in proto.opset_import if not o.domain), 0),
        size,
        metadata.get(NEEDS, ""),
        cpu.name,
        saturating(
            {r.name: roots[weight_of(n)] for r, n in zip(rows, layers, strict=True) if r.integer},
            cpu,
        ),
        besides(proto.graph, shapes, () if graph is None else graph.besides),
        stored_bytes(proto.graph, layers, size),
    )


def saturating_here(model: bytes | Path) -> tuple[str, ...]:
    """A warning if a file has weights that this computer's CPU cannot add exactly.

    Raises as `certify`.
    """
    return certify(model).notes if this_target().saturates else ()


def executed_nodes(model: bytes, optimized: onnx.ModelProto) -> dict[str, int]:
    """The index in the runtime's optimized graph of each named matrix node of a file."""
    graph = onnx.load_from_string(model).graph
    roots = constant_roots(graph)
    layers = [n for n in graph.node if n.op_type in MATRIX and weight_of(n) in roots]
    found = zip(layers, executions(graph, optimized.graph), strict=True)
    return {n.name: run.index for n, run in found if n.name and run.index >= 0}


def _of_graph(graph: QuantGraph, cpu: Target) -> dict[str, _Asked]:
    choices = {name: plan.choice for name, plan in graph.plans.items()}
    return {
        name: _Asked(choice, cpu.support(choice, graph.layers[name].operation))
        for name, choice in choices.items()
    }


def _inside(proto: onnx.ModelProto, layers: list[onnx.NodeProto], cpu: Target) -> dict[str, _Asked]:
    """What the policy inside a file asks for the layers it has."""
    policy = meta.from_metadata({p.key: p.value for p in proto.metadata_props}, "the file")
    if policy is None:
        return {}
    # A policy that names no target was for the computer that made the file, which may be another.
    named = "target" in policy.model_fields_set
    names, constants = [node.name for node in layers], constant_roots(proto.graph)
    choices = policy.resolve(names) if named else policy.choices(names)
    operations = {node.name: operation_of(node, constants) for node in layers}
    return {n: _Asked(choices[n], cpu.support(choices[n], operations[n])) for n in names}


def _promises(
    layers: list[onnx.NodeProto], asked: dict[str, _Asked], wiring: Wiring
) -> list[_Asked | None]:
    """What each matrix node was promised to be, with the grid that it reads."""
    found = [(asked.get(node.name), grid_of(node, wiring)) for node in layers]
    bits = asked_of_grids((grid, one.choice) for one, grid in found if one and one.support.integer)
    return [one and replace(one, grid=grid, bits=bits.get(grid.tensor, 0)) for one, grid in found]


def _row(
    node: onnx.NodeProto,
    stored: Stored,
    run: Execution,
    macs: int,
    asked: _Asked | None,
    wiring: Wiring,
    *,
    decoding_asked: bool,
) -> LayerCertificate:
    integer = run.op in INTEGER_OPS
    broken, reason = False, ""
    if asked is not None:
        broken, reason = _verdict(asked, stored, run, decoding_asked)
    if not integer and (broken or not reason):
        reason += (": " if reason else "") + why_float(node, wiring)
    if run.decoding:
        reason += (", " if reason else "") + "its weights dequantized at every run"
    return LayerCertificate(
        name=node.name or node.output[0],
        asked="-" if asked is None else asked.choice.asked,
        stored=stored.type,
        executed=run.op,
        integer=integer,
        macs=macs,
        broken=broken,
        reason=reason,
        stored_bits=stored.bits,
    )


def _verdict(
    asked: _Asked, stored: Stored, run: Execution, decoding_asked: bool
) -> tuple[bool, str]:
    """Whether a promise is broken, and which; or what else there is to say."""
    choice, reason = asked.choice, asked.support.reason
    contradiction = stored.contradiction(choice)
    known = asked.grid.bits or run.op in INTEGER_OPS  # else what it executes says enough
    if asked.support.integer and known and not contradiction:
        contradiction = asked.grid.contradiction(choice, asked.bits)
    if contradiction:
        return True, f"asked for {choice.asked}, but {contradiction}"
    unrounded = choice.exact and not run.rounded
    if asked.support.integer != (run.op in INTEGER_OPS) or run.decoding or unrounded:
        if decoding_asked and stored.type == "INT4":
            return False, "stored for other runtimes, as --int4-format dq asks"
        executes = f"executes {run.op or 'no such node'}"
        what = "rounds its input nowhere" if unrounded and run.op else executes
        return True, f"asked for {choice.asked}, but the runtime {what}"
    if choice.exact:
        reason += f"; {ROUNDED.format(run.rounded)}"
    if asked.support.integer and asked.bits != choice.activation_bits:
        reason = WIDER.format(asked.bits)
    return False, reason


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
        positions = shapes.get(node.output[0], [])[:-1]
    count: int = math.prod(weight.dims)
    return count * math.prod(positions)


def _boundaries(optimized: onnx.GraphProto) -> int:
    constants = constant_roots(optimized)
    return sum(
        n.op_type in ("QuantizeLinear", "DequantizeLinear") and n.input[0] not in constants
        for n in optimized.node
    )
