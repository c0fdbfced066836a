"""What a file stores and multiplies besides its matrix layers, read from the file alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import onnx

from mpq.layers import FloatPart

from .executed import MATRIX, constant_roots, weight_of

RECURRENT = ("LSTM", "GRU", "RNN")
Shapes = Mapping[str, list[int]]


def besides(
    graph: onnx.GraphProto, shapes: Shapes, known: Iterable[FloatPart] = ()
) -> tuple[FloatPart, ...]:
    """Recurrent layers, and products of two activations.

    Args:
        graph: of the file.
        shapes: of its values for one image.
        known: parts of the network that it was made from, which have better names.
    """
    roots = constant_roots(graph)
    found = [part for node in graph.node for part in _part(node, roots, shapes)]
    for kind in RECURRENT:
        of_kind = [part for part in known if part.kind == kind]
        places = [i for i, part in enumerate(found) if part.kind == kind]
        if not places:  # a loop, whose body is not looked into, or a product a step: layers' rows
            loops = any(node.op_type in ("Loop", "Scan") for node in graph.node)
            found += of_kind if loops else [replace(part, macs=0) for part in of_kind]
        one_for_all = of_kind * len(places) if len(of_kind) == 1 else of_kind
        for i, part in zip(places, one_for_all, strict=False):
            found[i] = replace(found[i], name=part.name)
    return tuple(found)


def _part(
    node: onnx.NodeProto, roots: Mapping[str, onnx.TensorProto], shapes: Shapes
) -> Iterator[FloatPart]:
    name = node.name or node.output[0]
    if node.op_type in RECURRENT:
        weights = [roots[i] for i in node.input[1:4] if i in roots]
        size = sum(4 * math.prod(t.dims) for t in weights)
        steps = math.prod(shapes.get(node.input[0], [1])[:-1])
        macs = steps * sum(math.prod(t.dims) for t in weights[:2])
        yield FloatPart(name, node.op_type, size, macs, "no integer kernel for recurrent layers")
    elif node.op_type in MATRIX and weight_of(node) not in roots:
        out, other = shapes.get(node.output[0], []), shapes.get(weight_of(node), [])
        inner = other[-2:-1] if "MatMul" in node.op_type else other[1:]
        macs = math.prod(out) * math.prod(inner)
        yield FloatPart(name, node.op_type, 0, macs, "a product of two activations has no weights")


def stored_bytes(
    graph: onnx.GraphProto, layers: Iterable[onnx.NodeProto], total: int
) -> dict[str, int]:
    """Bytes of the file by what they are for: `layers`, `besides`, `graph`; together all of it.

    Args:
        graph: of the file.
        layers: its matrix nodes.
        total: bytes of the file.
    """
    producers = {out: node for node in graph.node for out in node.output}
    sizes = {t.name: t.ByteSize() for t in graph.initializer}
    roots = constant_roots(graph)
    waiting = [name for node in layers for name in node.input if name in roots]
    own: dict[str, None] = {}
    for name in waiting:
        own.setdefault(name)
        fresh = producers[name].input if name in producers else ()
        waiting += [i for i in fresh if i in roots and i not in own]
    inside = sum(sizes.get(name, 0) for name in own)
    rest = sum(sizes.values()) - inside
    return {"layers": inside, "besides": rest, "graph": total - inside - rest}
