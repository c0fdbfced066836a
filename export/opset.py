"""Write a model in another opset than the one it was lowered in.

The operators that mpq writes mean the same from opset 18 to 25, newer versions only take more
types; what an older opset lacks is rewritten or refused. The runtimes that must take the result
are the judges (tests/test_forms.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from mpq.errors import ExportError

from .form import Form


def set_opset(model: ir.Model, form: Form) -> None:
    """Give a model the opset and the format version of `form`, in place.

    Raises:
        ExportError: an operator or attribute that the opset does not have.
    """
    for node in model.graph.all_nodes():
        if not node.domain:
            _check(node, form.opset)
    model.opset_imports[""] = form.opset
    model.ir_version = form.ir


def _check(node: ir.Node, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        schema = None
    known = () if schema is None else schema.attributes
    unknown = [name for name in sorted(node.attributes) if name not in known]
    if schema is None or unknown:
        given = ", ".join(f"{name}={node.attributes[name].value}" for name in unknown)
        what = f"{node.op_type} with {given}" if given else node.op_type
        raise ExportError(
            f"opset {opset} has no {what}, which this network needs. Leave --min-runtime and "
            "--int4-format at their defaults."
        )


def _gelu(op: Any, x: Any) -> Any:
    return op.Gelu(x, _outputs=["y"])


def _is_exact(context: Any, x: ir.Value, y: ir.Value) -> MatchResult:
    node, result = y.producer(), MatchResult()
    approximate = "none" if node is None else node.attributes.get_string("approximate", "none")
    return result if approximate == "none" else result.fail(f"approximated by {approximate}")


def _by_erf(op: Any, x: ir.Value, y: ir.Value) -> Any:
    root, one, half = (
        op.initializer(ir.tensor(np.float32(value)), f"{y.name}.{name}")
        for name, value in (("root", math.sqrt(2)), ("one", 1.0), ("half", 0.5))
    )
    return op.Mul(op.Mul(x, op.Add(op.Erf(op.Div(x, root)), one)), half)


GELU_BY_ERF = RewriteRule(_gelu, _by_erf, _is_exact, name="GeluByErf")
"""`gelu(x) = x (1 + erf(x / sqrt 2)) / 2` for opsets below 20; runtimes fuse it again."""
