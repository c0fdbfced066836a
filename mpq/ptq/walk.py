"""Evaluate a prepared graph node by node, float and quantized network in lock step.

Every node is evaluated for all calibration images before the next one is looked at, so that what is
decided at a layer sees the quantized network as it is up to there. Values that nothing reads any
more are dropped; the others lie in an `ActivationStore`, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from mpq.calls import Inputs, arguments, count
from mpq.ptq.observe import switched_off
from mpq.ptq.store import ActivationStore, Stored
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer

QUANTIZED, FLOAT = 0, 1


def evaluate(
    interpreter: fx.Interpreter,
    node: fx.Node,
    value: Callable[[fx.Node], Any],
    module: Callable[..., Any] | None = None,
) -> Any:
    """What a node gives.

    Args:
        interpreter: of the graph.
        node: any node but a placeholder.
        value: the values of the nodes before it.
        module: stands in for the module that the node calls.
    """
    args: Any = fx.node.map_arg(node.args, value)
    kwargs: Any = fx.node.map_arg(node.kwargs, value)
    if module is not None:
        return module(*args, **kwargs)
    return getattr(interpreter, node.op)(node.target, args, kwargs)


@dataclass(frozen=True)
class Target:
    """What a quantized layer stands for.

    Args:
        weight: the real weights that its integers stand for.
        bias: its bias before correction; None without one.
    """

    weight: Tensor
    bias: Tensor | None


class LockStep:
    """The values of both networks, as far as something still reads them.

    Args:
        module: a prepared graph in eval mode.
        parts: the calibration samples in batches (`mpq.calls.split`).
        store: where values are kept.
    """

    def __init__(
        self, module: fx.GraphModule, parts: Sequence[Inputs], store: ActivationStore
    ) -> None:
        self.module, self.parts, self.store = module, parts, store
        self.sizes = [count(part) for part in parts]
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        given = [arguments(module, part) for part in parts]
        self._given = [dict(zip(placeholders, values, strict=True)) for values in given]
        self.interpreter = fx.Interpreter(module, garbage_collect_values=False)
        self.modules: dict[str, nn.Module] = dict(module.named_modules())
        self.values: tuple[dict[fx.Node, list[Stored]], dict[fx.Node, list[Stored]]] = ({}, {})
        self.left = {n: len(n.users) for n in module.graph.nodes}
        self.layers = sum(self.layer(n) is not None for n in module.graph.nodes)

    def layer(self, node: fx.Node) -> QuantLayer | None:
        """The quantized layer that a node calls, if it calls one."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, QuantLayer) else None

    def inputs(self, node: fx.Node, which: int) -> list[Stored]:
        """The first input of a node in one of the networks, per batch."""
        return self.values[which][node.all_input_nodes[0]]

    def run(self, node: fx.Node, which: int, *, last: bool = False) -> list[Stored]:
        """What a node gives in one of the networks, per batch.

        `last` drops each batch of an input that no other node reads as soon as it was read: the
        values before and after the node are not in memory together.
        """
        layer = self.layer(node) if which == QUANTIZED else None
        frozen = layer and layer.frozen()  # the same, and its weights are rounded once
        read = [n for n in node.all_input_nodes if last and self.left[n] == 1]
        found = []
        for k in range(len(self.sizes)):
            value = self._evaluate(node, k, which, frozen)
            for used in read:
                self.values[which][used][k].drop()
            found.append(self.store.put(value))
        return found

    def keep(self, node: fx.Node, quantized: list[Stored], floats: list[Stored]) -> None:
        """Store the values of a node, and drop those that nothing reads any more."""
        self.values[QUANTIZED][node], self.values[FLOAT][node] = quantized, floats
        for used in node.all_input_nodes:
            self.release(used)
        if not self.left[node]:
            self._drop(node)

    def hold(self, node: fx.Node) -> None:
        """Keep a node's values until they are released."""
        self.left[node] += 1

    def release(self, node: fx.Node) -> None:
        """One reader less."""
        self.left[node] -= 1
        if self.left[node] == 0:
            self._drop(node)

    def renew(self, node: fx.Node, quantized: list[Stored]) -> None:
        """Replace what a node gives in the quantized network."""
        for old in self.values[QUANTIZED][node]:
            old.drop()
        self.values[QUANTIZED][node] = quantized

    def _drop(self, node: fx.Node) -> None:
        for values in self.values:
            for kept in values.pop(node, []):
                kept.drop()

    def _evaluate(
        self, node: fx.Node, part: int, which: int, frozen: nn.Module | None = None
    ) -> Any:
        if node.op == "placeholder":
            return self._given[part][node]

        def value(n: fx.Node) -> Any:
            return self.values[which][n][part].get()

        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if which == QUANTIZED or module is None:
            return evaluate(self.interpreter, node, value, frozen)
        if isinstance(module, FakeQuant):
            x = value(node.all_input_nodes[0])
            return x if module.ceiling is None else x.clamp(max=module.ceiling)
        with switched_off(module):
            return evaluate(self.interpreter, node, value)
