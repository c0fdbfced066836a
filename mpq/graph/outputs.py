"""What a graph answers with: each output with its kind, proposed from where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx, nn

from mpq.calls import leaves
from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.outputs import Evidence, Output, propose
from mpq.policy import OutputKind

SOFTMAX = frozenset(("softmax", "logsoftmax"))


def find_outputs(qg: QuantGraph, answer: Any) -> dict[str, Output]:
    """The outputs of a graph by name, each with the kind that is proposed for it.

    Args:
        qg: a graph whose layers are known.
        answer: what it gives for one image.
    """
    tensors, nodes = leaves(answer), output_nodes(qg.module)
    search, alone = _Search(qg), len(tensors) == 1
    return {
        name: propose(name, search.evidence(nodes.get(name), tensor), alone=alone)
        for name, tensor in tensors.items()
    }


def output_nodes(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes that a graph answers with, by name of output."""
    answer = module.graph.output_node().args[0]
    return leaves({"output": answer} if isinstance(answer, fx.Node) else answer, kind=fx.Node)


def stated(outputs: Mapping[str, Output]) -> dict[str, OutputKind]:
    """The kinds as a policy keeps them: none at all for a plain classifier, which needs no word."""
    kinds = {name: output.kind for name, output in outputs.items()}
    plain = classifier(outputs) and all(o.rule != "given" for o in outputs.values())
    return {} if plain else kinds


def classifier(outputs: Mapping[str, Output]) -> bool:
    """Whether a network answers with classes and nothing else, so that it has a top-1."""
    return [output.kind for output in outputs.values()] == ["classes"]


def as_places(outputs: Mapping[str, Output]) -> Mapping[str, Output]:
    """The only output as `places`, where nobody gave its kind and it is a map of classes."""
    [(name, found), *others] = outputs.items()
    seen = found.evidence
    if others or found.rule == "given" or not seen.floating or len(seen.shape) < 4:
        return outputs
    if seen.shape[1] < 2:  # split by its sign
        return outputs
    return {name: replace(found, kind="places", rule="the metric reads a class for each place")}


class _Search:
    """Walks back from an output to the layers that it comes from."""

    def __init__(self, qg: QuantGraph) -> None:
        self.layers, self.modules = qg.layers, dict(qg.module.named_modules())

    def evidence(self, node: fx.Node | None, tensor: Tensor) -> Evidence:
        """What is known of an output."""
        layers: dict[str, bool] = {}
        operations: set[str] = set()
        softmax: int | None = None
        seen, todo = set[fx.Node](), [] if node is None else [node]
        while todo:
            one = todo.pop(0)
            if one in seen or kind_of(one, self.modules) == "shape":
                continue
            seen.add(one)
            if one.op == "call_module" and (found := self._inside(str(one.target))):
                layers |= found
                continue
            operations.add(name := self._operation(one))
            if name in SOFTMAX and softmax is None:
                softmax = self._dimension(one)
            todo += one.all_input_nodes
        return Evidence(
            shape=tuple(tensor.shape),
            floating=tensor.is_floating_point(),
            layers=tuple(layers),
            convolved=any(layers.values()),
            operations=frozenset(operations),
            softmax=softmax,
            quantized=node is None or bool(layers),
        )

    def _inside(self, target: str) -> dict[str, bool]:
        """The layers of a module, and whether they are convolutions."""
        return {
            name: info.kind != "linear"
            for name, info in self.layers.items()
            if f"{name}.".startswith(f"{target}.")
        }

    def _operation(self, node: fx.Node) -> str:
        """`logsoftmax` of the function log_softmax, the method or the module LogSoftmax."""
        name = str(node.target)
        if node.op == "call_module":
            name = type(self.modules[name]).__name__
        elif node.op == "call_function":
            name = getattr(node.target, "__name__", name)
        return name.replace("_", "").lower()

    def _dimension(self, node: fx.Node) -> int | None:
        module: nn.Module | None = self.modules.get(str(node.target))
        if node.op == "call_module" and module is not None:
            found = getattr(module, "dim", None)
        else:
            found = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        return found if isinstance(found, int) else None
