"""Write a model in another opset than the one it was lowered in.

The operators that mpq writes mean the same from opset 18 to 25, newer versions only take more
types; what an older opset lacks is rewritten or refused. The runtimes that must take the result
are the judges (tests/test_forms.py).
"""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir

from mpq.errors import ExportError

from .form import Form


def set_opset(model: ir.Model, form: Form) -> int:
    """Give a model the opset and the format version of `form`, in place.

    Returns:
        The number of nodes rewritten.

    Raises:
        ExportError: an operator or attribute that the opset does not have.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type == "Gelu" and not node.domain and form.opset < 20:
            _gelu_by_erf(model.graph, node)
            count += 1
    for node in model.graph.all_nodes():
        if not node.domain:
            _check(node, form.opset)
    model.opset_imports[""] = form.opset
    model.ir_version = form.ir
    return count


def _check(node: ir.Node, opset: int) -> None:
    try:
        schema = onnx.defs.get_schema(node.op_type, opset)
    except onnx.defs.SchemaError:
        schema = None
    unknown = [] if schema is None else sorted(set(node.attributes) - set(schema.attributes))
    if schema is None or unknown:
        what = f"{node.op_type} with {unknown[0]}" if unknown else node.op_type
        raise ExportError(
            f"opset {opset} has no {what}, which this network needs. Leave --min-runtime and "
            "--int4-format at their defaults."
        )


def _gelu_by_erf(graph: ir.Graph, node: ir.Node) -> None:
    """`gelu(x) = x (1 + erf(x / sqrt 2)) / 2`, which runtimes fuse again."""
    approximate = node.attributes.get("approximate")
    if approximate is not None and approximate.as_string() != "none":
        raise ExportError("opset 18 has no Gelu by tanh. Leave --min-runtime at its default.")

    def constant(value: float) -> ir.Value:
        out = ir.val(f"gelu.{value:.3f}", const_value=ir.tensor(np.float32(value)))
        if out.name in graph.initializers:
            return graph.initializers[str(out.name)]
        graph.register_initializer(out)
        return out

    x = node.inputs[0]
    assert x is not None
    divided = ir.node("Div", [x, constant(math.sqrt(2))])
    erf = ir.node("Erf", [divided.outputs[0]])
    plus = ir.node("Add", [erf.outputs[0], constant(1.0)])
    product = ir.node("Mul", [x, plus.outputs[0]])
    half = ir.node("Mul", [product.outputs[0], constant(0.5)])
    graph.insert_before(node, [divided, erf, plus, product, half])
    half.outputs[0].shape, half.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    ir.convenience.replace_all_uses_with(node.outputs[0], half.outputs[0])
    graph.remove(node, safe=True)
