"""Helpers for changing an ONNX graph: constants, replacements, and what stands around a node.

A rule (`onnxscript.rewriter`) replaces a pattern of nodes, a pass changes a whole graph. Which node
is a layer's matrix node, and which gives the integers of a site, stands in the node's metadata
under the keys `LAYER` and `SITE`, as a module path; a rule hands it on to the nodes that it makes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter import MatchingTracer, RewriteRule

from .operators import LAYER_OPS

logger = logging.getLogger(__name__)
LAYER, SITE = "mpq.layer", "mpq.site"
"""Keys of `metadata_props` of nodes, gone from the finished file."""
Step: TypeAlias = RewriteRule | Callable[[ir.Graph], int]
"""A rule, or a pass that returns the number of its rewrites."""


def run(model: ir.Model, steps: Iterable[Step]) -> int:
    """Take the steps one after another; return the number of rewrites."""
    count = 0
    for step in steps:
        if not isinstance(step, RewriteRule):
            count += step(model.graph)
            continue
        count += step.apply_to_model(model)
        if logger.isEnabledFor(logging.DEBUG):
            for reason in refusals(step, model):
                logger.debug("%s does not apply: %s", step.name, reason)
    return count


def refusals(rule: RewriteRule, model: ir.Model) -> list[str]:
    """Why a rule does not apply where its pattern begins to match; the model stays as it is."""
    tracer = MatchingTracer()
    rule.apply_to_model(model, tracer=tracer)
    found = (match.match_result for match in tracer.best_matches_map[rule])
    return [result.reason for result in found if not result]


def constant(graph: ir.Graph, array: NDArray[Any] | np.generic) -> ir.Value:
    """A new initializer; equal ones are merged when the file is made small (`slim.py`)."""
    number = len(graph.initializers)
    while f"const.{number}" in graph.initializers:
        number += 1
    value = ir.val(f"const.{number}", const_value=ir.tensor(np.asarray(array)))
    graph.register_initializer(value)
    return value


class Writer:
    """Writes nodes before a given one.

    Args:
        graph: where to write.
        anchor: the node before which the new ones go.
    """

    def __init__(self, graph: ir.Graph, anchor: ir.Node) -> None:
        self.graph, self.anchor = graph, anchor

    def constant(self, array: NDArray[Any] | np.generic) -> ir.Value:
        """An initializer."""
        return constant(self.graph, array)

    def node(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node with one output."""
        node = ir.node(op, list(inputs), attributes=attributes)
        self.graph.insert_before(self.anchor, node)
        return node.outputs[0]


def integers(value: ir.Value | None) -> list[int] | None:
    """The contents of a constant, which the exporter may have passed through a Reshape."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    if value is None or value.const_value is None:
        return None
    return [int(v) for v in value.const_value.numpy().reshape(-1)]


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be read wherever `old` is."""
    new.shape, new.type = old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The node that alone reads a value, as its first input."""
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0][1] == 0 and not value.is_graph_output()
    return uses[0][0] if alone else None


def weight_decoding(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that gives a matrix node its weights; None for any other weights."""
    weight = node.inputs[1]
    decode = None if weight is None else weight.producer()
    return decode if decode is not None and decode.op_type == "DequantizeLinear" else None


def own_weight(node: ir.Node) -> ir.Value | None:
    """The integer initializer that a matrix node decodes, if no other node reads it."""
    decode = weight_decoding(node)
    weight = None if decode is None else decode.inputs[0]
    if weight is None or not weight.is_initializer() or len(weight.uses()) != 1:
        return None
    return weight


def stored_weights(graph: ir.Graph) -> Iterator[tuple[str, ir.Value]]:
    """Each layer's path and the initializer at the root of its weights."""
    for node in graph:
        path = node.metadata_props.get(LAYER)
        value = node.inputs[1] if path and node.op_type in LAYER_OPS else None
        while value is not None and (producer := value.producer()) is not None:
            value = producer.inputs[0] if producer.inputs else None
        if path and value is not None and value.is_initializer():
            yield path, value
