"""The integer reference: predict every integer tensor of the runtime, bit for bit.

The runtime's own optimized graph is walked node by node. Each kernel of `kernels.py` gets the
runtime's input tensors and must give its output tensor exactly. As the first node reads the images,
all integers of a file whose nodes all agree are predicted from the file and the images alone.
Operations that only move values are evaluated by the reference implementation of ONNX. What is left
(float operations, kernels without a reference) is named, and is no integer of the file's promise.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mpq.errors import DataError, ExportError
from mpq.shown import Shown
from mpq.targets import this_target

from . import foreign, runtime
from .arithmetic import kernels_of
from .feeds import Feed, feeds, fixed_batch
from .kernels import Kernel
from .operators import MOVES

Array = NDArray[Any]
REFERENCED = (MOVES - {"MaxPool"}) | {
    *("Concat", "SpaceToDepth", "Clip", "Relu", "Identity", "Expand", "Shape"),
}
"""What the reference implementation of ONNX evaluates; a MaxPool of floats is float arithmetic."""


@dataclass(frozen=True, slots=True)
class NodeCheck:
    """One output of one node of the optimized graph.

    Args:
        name: of the node, the layer's where there is one.
        op: type.
        elements: compared values.
        mismatches: how many are not equal, bit for bit; None where there is no reference.
        max_step: largest difference, in steps for integers, absolute for floats.
        reason: why there is no reference.
    """

    name: str
    op: str
    elements: int
    mismatches: int | None
    max_step: float = 0.0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class ExactReport(Shown):
    """Whether a file's integers are those of the reference.

    Args:
        file: what was examined.
        runtime: version of onnxruntime.
        n: images.
        nodes: in the order of execution.
        same_output: whether the examined graph gave, to the bit, what the file gives by default, in
            every output.
    """

    TABLES = ("exact_table",)
    file: str
    runtime: str
    n: int
    nodes: tuple[NodeCheck, ...]
    same_output: bool

    @property
    def exact(self) -> bool:
        """Every node that has a reference agrees with it in every bit."""
        return self.same_output and not self.differing()

    def differing(self) -> list[NodeCheck]:
        """Nodes with a reference that gave something else."""
        return [node for node in self.nodes if node.mismatches]

    def unpredicted(self) -> list[NodeCheck]:
        """Nodes without a reference."""
        return [node for node in self.nodes if node.mismatches is None]

    def to_json(self) -> str:
        """The contents of `exact.json`."""
        return json.dumps({"exact": self.exact, **asdict(self)}, indent=1)


def verify_exact(
    model: Path | bytes, images: Feed, there: foreign.Foreign | None = None
) -> ExactReport:
    """Compare every node of a file, as the runtime executes it, with the integer reference.

    Args:
        model: an ONNX file or its bytes, whoever wrote it.
        images: one batch, of the type and layout that the model takes; of several inputs an array
            each, by name or in their order. A model of a fixed batch takes that many.
        there: the runtime that executes it; None: the one at hand.

    Raises:
        UsageError: there is no such file.
        ExportError: the runtime cannot load or run it.
        DataError: the images are not what it takes.
    """
    loaded, name = runtime.session(model), model.name if isinstance(model, Path) else "the model"
    given = {n: np.ascontiguousarray(x) for n, x in feeds(loaded, images).items()}
    count, fixed = max((len(x) for x in given.values() if x.ndim), default=1), fixed_batch(loaded)
    if fixed and count != fixed:
        raise DataError(f"{name} runs {fixed} images at a time. Got {count}.")
    if there is None:
        expected = runtime.answers(loaded, given, batch=count)
        optimized, told = runtime.optimized_model(model), runtime.version()
        tapped, names = _tapped(optimized)
        values = runtime.values(tapped, given, names, optimize=False)
    else:
        expected, optimized, told = foreign.answer(there, model, given)
        values = foreign.values(there, _tapped(optimized)[0], given)
    values |= given
    values |= {t.name: numpy_helper.to_array(t) for t in optimized.graph.initializer}
    opset = {o.domain: o.version for o in optimized.opset_import}.get("", 21)
    kernels = kernels_of(there.arithmetic if there else this_target().arithmetic)
    checks = [c for node in optimized.graph.node for c in _check(node, values, opset, kernels)]
    same = all(
        x.size == values[n].size and np.array_equal(values[n].reshape(x.shape), x)
        for n, x in expected.items()
    )
    return ExactReport(name, told, count, tuple(checks), same)


def _tapped(optimized: onnx.ModelProto) -> tuple[bytes, list[str]]:
    """A model whose outputs are all of its tensors, and their names."""
    tapped = onnx.ModelProto()
    tapped.CopyFrom(optimized)
    known = {o.name for o in tapped.graph.output}
    names = [out for n in tapped.graph.node for out in n.output if out]
    for name in names:
        if name not in known:
            tapped.graph.output.append(onnx.ValueInfoProto(name=name))
    return tapped.SerializeToString(), names


def _check(
    node: onnx.NodeProto, values: dict[str, Array], opset: int, kernels: Mapping[str, Kernel]
) -> Iterator[NodeCheck]:
    """Compare the first output of a node (or all, where it splits)."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    inputs = [values[name] if name else None for name in node.input]
    got = [values[name] for name in node.output if name]
    name = _label(node)
    if node.op_type in kernels and supported(node, inputs):
        result = kernels[node.op_type](inputs, attributes)
        predicted = result if isinstance(result, list) else [result]
    elif node.op_type in REFERENCED and not node.domain:
        predicted = by_onnx(node, inputs, opset)
    else:
        yield NodeCheck(name, node.op_type, got[0].size, None, reason=_reason(node, inputs))
        return
    for want, have in zip(predicted, got, strict=False):
        yield _compare(name, node.op_type, want, have)


def supported(node: onnx.NodeProto, inputs: list[Array | None]) -> bool:
    """Kernels are per tensor where the runtime's are; a max pooling of floats has no reference."""
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = inputs[1]
        return len(inputs) > 2 and scale is not None and scale.size == 1
    return node.op_type not in ("MaxPool", "NhwcMaxPool") or (
        inputs[0] is not None and inputs[0].dtype.kind in "ui" and len(node.output) == 1
    )


def _reason(node: onnx.NodeProto, inputs: list[Array | None]) -> str:
    if any(x is not None and x.dtype in (np.uint8, np.int8) for x in inputs[:1]):
        return "an integer kernel without a reference"
    return "float"


def by_onnx(node: onnx.NodeProto, inputs: list[Array | None], opset: int) -> list[Array]:
    """One node by the reference implementation of ONNX."""
    given = {n: x for n, x in zip(node.input, inputs, strict=True) if x is not None}
    infos = [helper.make_tensor_value_info(n, _type(x), x.shape) for n, x in given.items()]
    outputs = [onnx.ValueInfoProto(name=n) for n in node.output]
    graph = helper.make_graph([node], "node", infos, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        return list(ReferenceEvaluator(model).run(None, given))
    except Exception as error:  # the reference raises whatever its parts raise
        raise ExportError(f"ONNX's reference fails on {node.op_type}: {error}") from error


def _type(x: Array) -> int:
    return int(helper.np_dtype_to_tensor_dtype(x.dtype))


def _label(node: onnx.NodeProto) -> str:
    name = str(node.name).partition("_token_")[0]
    return name or str(node.output[0])


def _compare(name: str, op: str, want: Array, have: Array) -> NodeCheck:
    if want.shape != have.shape or want.dtype != have.dtype:
        raise ExportError(
            f"the reference of {op} {name} must give {have.dtype} {have.shape}. "
            f"Got {want.dtype} {want.shape}."
        )
    different = want != have
    count = int(np.count_nonzero(different))
    step = float(np.abs(want.astype(np.float64) - have).max()) if count else 0.0
    return NodeCheck(name, op, have.size, count, step)
