"""The ends of a file: its inputs and outputs, one tensor each, in order and by name.

A network may take and answer trees. What is exported takes the tensors of `mpq.calls.flat` and
answers with those of `mpq.calls.leaves`, in their order; numbers and None have no place in a file.
"""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, fx

from mpq.calls import arguments, flat, leaves
from mpq.graph.ir import QuantGraph


def flattened(qg: QuantGraph) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """A graph's module with one argument for each tensor and a tuple of tensors as answer.

    Returns:
        The module, which shares everything with that of the graph, and the example for it.
    """
    module, example = qg.module.eval(), tuple(flat(qg.module, qg.example))
    trees = arguments(module, qg.example)
    plain = all(isinstance(value, Tensor) for value in trees)
    if plain and isinstance(module.graph.output_node().args[0], fx.Node):
        return module, example
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    for node, value in zip(graph.find_nodes(op="placeholder"), trees, strict=True):
        if not isinstance(value, Tensor):
            _open(graph, node, value)
    end = graph.output_node()
    answer = {"output": end.args[0]} if isinstance(end.args[0], fx.Node) else end.args[0]
    found = leaves(answer, kind=fx.Node)
    given = [found[name] for name in qg.outputs]
    with graph.inserting_before(end):
        for i, node in enumerate(given):
            if node in given[:i]:  # the exporter gives a tensor one output
                given[i] = graph.call_function(torch.clone, (node,))
    end.args = (tuple(given),)
    return fx.GraphModule(module, graph).eval(), example


def _open(graph: fx.Graph, node: fx.Node, value: Any) -> None:
    """Put an input for each tensor of a tree in place of the tree."""
    with graph.inserting_before(node):
        made = {path: graph.placeholder(f"{node.name}_{i}")
                for i, path in enumerate(leaves(value))}  # fmt: skip
    _read(node, value, "" if isinstance(value, dict) else "output", made)
    graph.erase_node(node)


def _read(node: fx.Node, value: Any, path: str, made: dict[str, fx.Node]) -> None:
    """Let what takes parts of a tree read the inputs that stand for them."""
    for user in list(node.users):
        assert user.target is operator.getitem
        key: Any = user.args[1]
        below = f"{path}.{key}" if path else str(key)
        if below in made:
            user.replace_all_uses_with(made[below])
        else:
            _read(user, value[key], below, made)
        user.graph.erase_node(user)


def output_names(qg: QuantGraph) -> tuple[str, ...]:
    """The names of a file's outputs; one that an input has already begins with `output.`."""
    return tuple(f"output.{name}" if name in qg.inputs else name for name in qg.outputs)


def name_ends(model: ir.Model, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
    """Give inputs and outputs of a model their names, in place; the last thing but `slim`."""
    graph = model.graph
    for i, value in enumerate(graph.outputs):
        if value.is_initializer() or value.is_graph_input() or value in graph.outputs[:i]:
            again = ir.node("Identity", [value])
            graph.append(again)
            graph.outputs[i] = again.outputs[0]
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
