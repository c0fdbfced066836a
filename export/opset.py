"""Write a model in another opset than the one it was lowered in.

From opset 18 to 25 most operators only take more types. What an older one lacks, and the few that
mean something else in it (a GroupNormalization has a scale per group before opset 21), are
rewritten or refused. The runtimes that must take the result are the judges (tests/test_opset.py,
tests/test_forms.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from mpq.errors import ExportError

from .edit import Step
from .form import Form

_NEWER_VALUES = {
    ("Pad", "mode", "wrap"): 19,
    ("Resize", "coordinate_transformation_mode", "half_pixel_symmetric"): 19,
}
"""Values that an attribute has from an opset on."""
_GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}
"""As they are called before opset 20."""


def set_opset(model: ir.Model, form: Form) -> None:
    """Give a model the opset and the format version of `form`, in place.

    Raises:
        ExportError: an operator or attribute that the opset does not have.
    """
    nodes = [node for node in model.graph.all_nodes() if not node.domain]
    for node in nodes:
        _check(node, form.opset)
    for node in nodes if form.opset < 20 else ():
        mode = node.attributes.get_string("mode", "") if node.op_type == "GridSample" else ""
        if mode in _GRID_MODES:
            node.attributes["mode"] = ir.AttrString("mode", _GRID_MODES[mode])
    model.opset_imports[""] = form.opset
    model.ir_version = form.ir


def _check(node: ir.Node, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        schema = None
    lacks = list(_lacks(node, schema, opset))
    if schema is None or lacks:
        what = f"{node.op_type} with {', '.join(lacks)}" if lacks else node.op_type
        raise ExportError(
            f"opset {opset} has no {what}, which this network needs. Leave --min-runtime and "
            "--int4-format at their defaults."
        )


def _lacks(node: ir.Node, schema: onnx.defs.OpSchema | None, opset: int) -> Iterator[str]:
    """What of a node its operator does not have in an opset, or has with another meaning."""
    known = () if schema is None else schema.attributes
    for name, attribute in sorted(node.attributes.items()):
        since = _NEWER_VALUES.get((node.op_type, name, str(attribute.value)), 0)
        if name not in known or opset < since:
            yield f"{name}={attribute.value}"
    if schema is not None and len(node.inputs) > schema.max_input:
        yield f"{len(node.inputs)} inputs"
    if node.op_type == "GroupNormalization" and opset < 21:
        yield "a scale per channel"


def steps(form: Form) -> Iterator[Step]:
    """Rewritings that an older opset needs."""
    if form.opset < 21:
        yield GROUPS_BY_INSTANCES
    if form.opset < 20:
        yield from (GELU_BY_ERF, GELU_BY_TANH)
    if form.opset < 19:
        yield WRAP_BY_SLICES


def _gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x, _outputs=["y"])


def _approximated(how: str) -> Any:
    def check(context: Any, x: ir.Value, y: ir.Value) -> MatchResult:
        given, result = _node(y).attributes.get_string("approximate", "none"), MatchResult()
        return result if given == how else result.fail(f"approximated by {given}")

    return check


def _node(y: ir.Value) -> ir.Node:
    node = y.producer()
    assert node is not None
    return node


def _constants(op: Any, y: ir.Value, **values: Any) -> list[Any]:
    return [op.initializer(ir.tensor(v), f"{y.name}.{name}") for name, v in values.items()]


def _by_erf(op: Any, x: ir.Value, y: ir.Value) -> Any:
    values = {"root": math.sqrt(2), "one": 1.0, "half": 0.5}
    root, one, half = _constants(op, y, **{k: np.float32(v) for k, v in values.items()})
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


def _by_tanh(op: Any, x: ir.Value, y: ir.Value) -> Any:
    values = {"root": math.sqrt(2 / math.pi), "cubic": 0.044715, "one": 1.0, "half": 0.5}
    root, cubic, one, half = _constants(op, y, **{k: np.float32(v) for k, v in values.items()})
    inner = op.Mul(op.Add(x, op.Mul(cubic, op.Mul(x, op.Mul(x, x)))), root)
    return op.Mul(op.Mul(x, op.Add(op.Tanh(inner), one)), half)


def _group_norm(op: Any, x: Any, scale: Any, bias: Any) -> Any:
    return op.GroupNormalization(x, scale, bias, _outputs=["y"])


def _has_rank(context: Any, x: ir.Value, **others: ir.Value) -> MatchResult:
    result = MatchResult()
    return result if x.shape is not None else result.fail("of an unknown number of dimensions")


def _by_instances(op: Any, x: ir.Value, scale: ir.Value, bias: ir.Value, y: ir.Value) -> Any:
    assert x.shape is not None
    how = _node(y).attributes
    groups, epsilon = how.get_int("num_groups"), how.get_float("epsilon", 1e-5)
    ones, zeros, parts, axes = _constants(
        op,
        y,
        ones=np.ones(groups, np.float32),
        zeros=np.zeros(groups, np.float32),
        parts=np.array([0, groups, -1]),
        axes=np.arange(1, len(x.shape) - 1),
    )
    normed = op.InstanceNormalization(op.Reshape(x, parts), ones, zeros, epsilon=epsilon)
    whole = op.Reshape(normed, op.Shape(x))
    return op.Add(op.Mul(whole, op.Unsqueeze(scale, axes)), op.Unsqueeze(bias, axes))


def _pad(op: Any, x: Any, pads: Any) -> Any:
    return op.Pad(x, pads, mode="wrap", _allow_other_inputs=True, _outputs=["y"])


def _has_constant_pads(context: Any, x: ir.Value, pads: ir.Value, y: ir.Value) -> MatchResult:
    result = MatchResult()
    plain = pads.const_value is not None and all(v is None for v in _node(y).inputs[2:])
    return result if plain else result.fail("by sizes that are computed")


def _by_slices(op: Any, x: ir.Value, pads: ir.Value, y: ir.Value) -> Any:
    assert pads.const_value is not None
    before, after = np.split(pads.const_value.numpy(), 2)
    for axis, (low, high) in enumerate(zip(before.tolist(), after.tolist(), strict=True)):
        given = {"axis": [axis], "start": [0], "end": [high], "last": [-low], "rest": [2**31 - 1]}
        named = {f"{name}{axis}": np.array(v) for name, v in given.items()}
        along, start, end, last, rest = _constants(op, y, **named) if low or high else [None] * 5
        head = [op.Slice(x, last, rest, along)] if low else []
        tail = [op.Slice(x, start, end, along)] if high else []
        x = op.Concat(*head, x, *tail, axis=axis) if low or high else x
    return x


GELU_BY_ERF = RewriteRule(_gelu, _by_erf, _approximated("none"), name="GeluByErf")
"""`gelu(x) = x (1 + erf(x / sqrt 2)) / 2` for opsets below 20; runtimes fuse it again."""
GELU_BY_TANH = RewriteRule(_gelu, _by_tanh, _approximated("tanh"), name="GeluByTanh")
"""`gelu(x) ~ x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2` (Hendrycks and Gimpel, 2016)."""
GROUPS_BY_INSTANCES = RewriteRule(_group_norm, _by_instances, _has_rank, name="GroupsByInstances")
"""A group as one instance, then scale and bias per channel."""
WRAP_BY_SLICES = RewriteRule(_pad, _by_slices, _has_constant_pads, name="WrapBySlices")
"""Circular padding puts the end before the beginning, and the beginning after the end."""
