"""A network taken apart into one file for each layer, so that any runtime can time its layers.

A piece holds the nodes that are charged to a layer (`profile.charged_to`) in the graph that the
runtime makes of a file, and is run as it stands. It computes the same `COPIES` times, so that what
a run costs besides hardly counts. Blocked layouts of float convolutions are left out, which only
some CPUs have.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from . import runtime
from .certify import executed_nodes

COPIES = 8
_FED = (np.float32, np.uint8, np.int8)
"""Types of tensors that a piece is given; others (shapes) are constants of it."""
_BLOCKED = "NchwcTransformer"


def portable_graph(model: bytes) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The graph that any CPU could run, and the index of each layer's matrix node in it."""
    optimized: onnx.ModelProto = runtime.optimized_model(model, without=(_BLOCKED,))
    return optimized, executed_nodes(model, optimized)


def pieces(
    optimized: onnx.ModelProto, owners: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> dict[str, bytes]:
    """A model for each layer.

    Args:
        optimized: a graph in the order of execution.
        owners: the layer that each of its nodes is charged to.
        feeds: one batch of inputs, whose shapes the pieces are fixed to.
    """
    graph = optimized.graph
    produced = [name for node in graph.node for name in node.output if name]
    known = _values(optimized, produced, feeds) | dict(feeds)
    stored = {t.name: t for t in graph.initializer}
    found = {}
    for layer in dict.fromkeys(owners):
        nodes = [n for n, owner in zip(graph.node, owners, strict=True) if owner == layer]
        found[layer] = _piece(optimized, nodes, known, stored).SerializeToString()
    return found


def _values(
    optimized: onnx.ModelProto, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[Any]]:
    """Every value of a graph, for one batch."""
    model = onnx.ModelProto()
    model.CopyFrom(optimized)
    have = {o.name for o in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in have)
    return runtime.values(model.SerializeToString(), feeds, names, optimize=False)


def _piece(
    optimized: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    known: Mapping[str, NDArray[Any]],
    stored: Mapping[str, onnx.TensorProto],
) -> onnx.ModelProto:
    own = {name for node in nodes for name in node.output}
    read = [name for node in nodes for name in node.input if name and name not in own]
    constants = [stored[n] for n in dict.fromkeys(read) if n in stored]
    inputs = []
    for name in dict.fromkeys(n for n in read if n not in stored):
        value = known[name]
        if value.dtype in _FED:
            inputs.append(_info(name, value))
        else:
            constants.append(numpy_helper.from_array(value, name))
    inside = {name for node in nodes for name in node.input}
    ends = [_info(n, known[n]) for node in nodes for n in node.output if n and n not in inside]
    copies = [copy for i in range(COPIES) for copy in _renamed(nodes, own, i)]
    graph = helper.make_graph(copies, "piece", inputs, ends, constants)
    model = helper.make_model(graph, ir_version=optimized.ir_version)
    del model.opset_import[:]
    model.opset_import.extend(optimized.opset_import)
    return model


def _renamed(
    nodes: Sequence[onnx.NodeProto], own: set[str], number: int
) -> Iterable[onnx.NodeProto]:
    """The nodes with values of their own; the first copy keeps its names."""
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        if number:
            for names in (copy.input, copy.output):
                names[:] = [f"{n}.{number}" if n and n in own else n for n in names]
        yield copy


def _info(name: str, value: NDArray[Any]) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(name, kind, value.shape)
