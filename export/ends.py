"""The ends of a file: its inputs and outputs, one tensor each, in order and by name.

A network may take and answer trees. What is exported takes the tensors of `mpq.calls.flat` and
answers with those of `mpq.calls.leaves`, in their order; numbers and None have no place in a file.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx

from mpq.axes import AXES, TRIED, check_axes, resized
from mpq.calls import Inputs, arguments, call, described, flat, leaves, take
from mpq.errors import GraphError, UsageError
from mpq.graph.ir import QuantGraph

logger = logging.getLogger(__name__)
OTHER_IMAGES = 16
"""How many images a file with free sizes is verified on at each of the other sizes."""


class Asked(TypedDict, total=False):
    """What may be asked of a file's ends; see `Ends`."""

    input_names: Sequence[str]
    output_names: Sequence[str]
    dynamic: Sequence[str]


@dataclass(frozen=True)
class Ends:
    """What a file takes and gives.

    Args:
        inputs: names of its inputs, in order; empty: those of the network's arguments.
        outputs: names of its outputs, in order; empty: those of the network's answer, where one
            that an input has already begins with `output.`.
        free: sizes that are not fixed to those of the example (`mpq.axes`); the batch always is.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    free: tuple[str, ...] = ("batch",)

    def check(self, qg: QuantGraph) -> None:
        """Refuse what a graph does not have.

        Raises:
            UsageError: the number of names is not that of the tensors, names are empty or not
                unique, or no input has a size of that name.
            GraphError: the graph holds at the sizes of its example only.
        """
        for kind, given, has in (
            ("input", self.inputs, qg.inputs),
            ("output", self.outputs, qg.outputs),
        ):
            if given and len(given) != len(has):
                raise UsageError(
                    f"{kind} names must be {len(has)}, one for each of {', '.join(has)}. Got "
                    f"{', '.join(given)}."
                )
        names = [name for ends in self.names(qg) for name in ends]
        wrong = next((name for name in names if not name or names.count(name) > 1), None)
        if wrong is not None:
            raise UsageError(
                f"names of inputs and outputs must differ and not be empty. Got {wrong!r} among "
                f"{', '.join(names)}."
            )
        check_axes(flat(qg.module, qg.example), self.free)
        if self.free[1:] and qg.sizes:
            raise GraphError(
                f"{', '.join(self.free[1:])} cannot be dynamic: {qg.sizes}. Write what depends on "
                "sizes with tensors and their shapes, or export one file for each size."
            )

    @classmethod
    def of(
        cls,
        *,
        input_names: Sequence[str] = (),
        output_names: Sequence[str] = (),
        dynamic: Sequence[str] = (),
    ) -> Ends:
        """Ends as they are asked for; the batch is free without being asked."""
        return cls(
            tuple(input_names), tuple(output_names), tuple(dict.fromkeys(("batch", *dynamic)))
        )

    def others(self, qg: QuantGraph, images: Inputs) -> list[Any]:
        """Some images at other sizes, as far as they are free and the graph runs on them.

        Raises:
            GraphError: sizes are free, and the graph runs on no other.
        """
        if not self.free[1:]:
            return []
        for decided in qg.frozen:
            logger.warning("at any size of the input, as in the example, %s", decided)
        found, why = [], ""
        for other in resized(take(images, slice(OTHER_IMAGES)), self.free):
            try:
                call(qg.module, other)
            except Exception as error:
                why = f"{described(other)}: {str(error).partition(chr(10))[0]}"
            else:
                found.append(other)
            if len(found) == TRIED:
                break
        if not found:
            raise GraphError(
                f"{', '.join(self.free[1:])} cannot be dynamic: the network runs on no other size "
                f"that was tried ({why}). Export one file for each size."
            )
        return found

    def names(self, qg: QuantGraph) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of inputs and of outputs."""
        inputs = self.inputs or qg.inputs
        own = (f"output.{name}" if name in inputs else name for name in qg.outputs)
        return inputs, self.outputs or tuple(own)


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


def ends_of(model: onnx.ModelProto) -> Ends:
    """The ends that a file was written with."""
    graph = model.graph
    dims = [d.dim_param for value in graph.input for d in value.type.tensor_type.shape.dim]
    return Ends(
        tuple(value.name for value in graph.input),
        tuple(value.name for value in graph.output),
        tuple(name for name in AXES if name in dims),
    )
