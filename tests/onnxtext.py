"""Small ONNX graphs written as text, for tests of what changes a graph."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import numpy_helper

from mpq.export import runtime

Array = NDArray[np.generic]


def parse(text: str, **constants: object) -> ir.Model:
    """A model of opset 21 from `(inputs) => (outputs) { nodes }` and its initializers."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    return ir.from_proto(proto)


def node(model: ir.Model, op: str) -> ir.Node:
    """The only node of a type."""
    (found,) = (n for n in model.graph if n.op_type == op)
    return found


def ops(model: ir.Model) -> list[str]:
    """Types of the nodes, in the order of the graph."""
    return [n.op_type for n in model.graph]


def answer(model: ir.Model, **feeds: Array) -> Array:
    """What onnxruntime gives, without optimizations."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    session = runtime.session(proto.SerializeToString(), optimize=False)
    return np.asarray(session.run(None, feeds)[0])
