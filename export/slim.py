"""Make the file small.

Only layers keep a node name, equal constants are stored once, attributes that repeat the operator's
default go, and values get names of one or two letters.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from .edit import LAYER, SITE
from .operators import LAYER_OPS

OPSET = 21
_PER_AXIS = {"strides": 1, "dilations": 1, "pads": 0}


def slim(model: ir.Model) -> dict[str, str]:
    """Shrink a packed model in place.

    Returns:
        site -> final name of its integer value.
    """
    graph = model.graph
    layers = {node: node.metadata_props.get(LAYER) for node in graph if node.op_type in LAYER_OPS}
    sites = {node: node.metadata_props.get(SITE) for node in graph}
    common.ClearMetadataAndDocStringPass()(model)
    common.DeduplicateInitializersPass(size_limit=1 << 30)(model)
    for node, layer in layers.items():
        node.overload = layer or ""  # layers of equal weights that read one tensor stay apart
    common.CommonSubexpressionEliminationPass()(model)
    for node in layers:
        node.overload = ""
    common.RemoveUnusedNodesPass()(model)
    _shorten(graph)
    found: dict[str, str] = {}
    for node in graph:
        node.name = layers.get(node)
        if site := sites.get(node):  # of several nodes of a site, the last gives its integers
            found[site] = str(_last_integer(node).name)
        _drop_defaults(node)
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = value.type = None
    for value in (*graph.inputs, *graph.outputs):
        value.metadata_props.clear()
    graph.name = "g"
    model.producer_name, model.producer_version = "mpq", None
    model.metadata_props.clear()
    return found


def _last_integer(quantize: ir.Node) -> ir.Value:
    """The integers of a site: after the Clip of a format below 8 bits."""
    out = quantize.outputs[0]
    clips = [n for n, _ in out.uses() if n.op_type == "Clip"]
    return clips[0].outputs[0] if clips else out


def _short_names() -> Iterator[str]:
    letters = string.ascii_letters
    for length in itertools.count(1):
        for parts in itertools.product(letters, repeat=length):
            yield "".join(parts)


def _shorten(graph: ir.Graph) -> None:
    """Name values, the shortest for those that are named most often."""
    ends = {value.name for value in (*graph.inputs, *graph.outputs)}
    names = (name for name in _short_names() if name not in ends)
    initializers = list(graph.initializers.values())
    made = [v for node in graph for v in node.outputs if not v.is_graph_output()]
    graph.initializers.clear()  # all at once: one may have the name that another gets
    for value in sorted([*initializers, *made], key=lambda v: -len(v.uses())):
        value.name = next(names)
    for value in initializers:
        graph.register_initializer(value)


def _drop_defaults(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        if _is_default(node, name, attribute):
            del node.attributes[name]


def _is_default(node: ir.Node, name: str, attribute: ir.Attr) -> bool:
    if name in _PER_AXIS:  # the schema cannot say these, they depend on the rank
        return set(attribute.as_ints()) == {_PER_AXIS[name]}
    if name == "axis" and node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        scale = node.inputs[1]
        return scale is not None and scale.shape is not None and len(scale.shape) == 0
    if node.domain:
        return False
    schema = onnx.defs.get_schema(node.op_type, OPSET).attributes.get(name)
    if schema is None or not schema.default_value.name:
        return False
    stored = ir.from_proto(ir.to_proto(attribute))  # 0.01 as the float32 that a file has
    return bool(ir.from_proto(schema.default_value).value == stored.value)
