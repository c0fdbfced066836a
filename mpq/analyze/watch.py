"""Look at tensors while a network runs, and say where NaN and infinity begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from mpq.calls import Inputs, arguments, call, leaves
from mpq.errors import DataError
from mpq.graph.ir import QuantGraph
from mpq.hooks import hooked
from mpq.nonfinite import first_nonfinite


class Watch(fx.Interpreter):
    """Runs a graph and shows each named tensor to `see(name, tensor)`.

    Names of layers (inside modules that cannot be traced) stand for the layer's input.
    """

    def __init__(
        self, graph: QuantGraph, tensors: Sequence[str], see: Callable[[str, Tensor], Tensor]
    ) -> None:
        super().__init__(graph.module)
        self.graph_module = graph.module
        self.wanted, self.see = set(tensors), see
        nodes = {node.name for node in graph.module.graph.nodes}
        self.inner = [
            (name, graph.module.get_submodule(name))
            for name in tensors
            if name in graph.layers and name not in nodes
        ]

    def run(self, *args: Any, **options: Any) -> Any:
        """Run the graph, as `fx.Interpreter` does."""
        with hooked(m.register_forward_pre_hook(self._input_hook(n)) for n, m in self.inner):
            return super().run(*args, **options)

    def answer(self, inputs: Inputs) -> Any:
        """What the graph answers to inputs (`mpq.calls`)."""
        return self.run(*arguments(self.graph_module, inputs))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what `see` returns takes the tensor's place."""
        out = super().run_node(n)
        return self.see(n.name, out) if n.name in self.wanted else out

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        return lambda _, args: self.see(name, args[0])


def reaching(inputs: Inputs) -> Any:
    """A copy of inputs whose floats ask for a gradient: the first layer's output then has one."""
    return tree_map_only(
        Tensor, lambda x: x.detach().clone().requires_grad_(x.is_floating_point()), inputs
    )


def require_finite(
    values: Any, graph: QuantGraph, images: Inputs, *, otherwise: str | None = None
) -> None:
    """Raise for NaN and infinity, naming the layer where they begin.

    Args:
        values: what to check: a tensor, or a tree of them.
        graph: the network, to look for the layer.
        images: the images that it saw.
        otherwise: the layer to name when every layer's output is finite.

    Raises:
        DataError: `values` are not finite.
    """
    if all(bool(torch.isfinite(value).all()) for value in leaves(values).values()):
        return
    layers = {name: graph.module.get_submodule(name) for name in graph.layers}
    found = first_nonfinite(layers, lambda: call(graph.module, images))
    name = found.name if found else otherwise or list(layers)[-1]
    raise DataError(
        f"the output or input of layer {name} must be finite on every image but is NaN or "
        "infinite. Check the normalization of the images and the checkpoint."
    )
