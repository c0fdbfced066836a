"""Look at tensors while a network runs, and say where NaN and infinity begin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.errors import DataError
from mpq.graph.ir import QuantGraph


class Watch(fx.Interpreter):
    """Runs a graph and shows each named tensor to `see(name, tensor)`.

    Names of layers (inside modules that cannot be traced) stand for the layer's input.
    """

    def __init__(
        self, graph: QuantGraph, tensors: Sequence[str], see: Callable[[str, Tensor], Tensor]
    ) -> None:
        super().__init__(graph.module)
        self.wanted, self.see = set(tensors), see
        self.handles = [
            graph.module.get_submodule(name).register_forward_pre_hook(self._input_hook(name))
            for name in tensors
            if name in graph.layers and name not in {n.name for n in graph.module.graph.nodes}
        ]

    def _input_hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor]:
        return lambda _, args: self.see(name, args[0])

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; what `see` returns takes the tensor's place."""
        out = super().run_node(n)
        return self.see(n.name, out) if n.name in self.wanted else out

    def close(self) -> None:
        """Unhook from the layers."""
        for handle in self.handles:
            handle.remove()


_NOT_FINITE = (
    "the output or input of layer {} must be finite on every image but is NaN or infinite. "
    "Check the normalization of the images and the checkpoint."
)


@torch.no_grad()
def not_finite(graph: QuantGraph, images: Tensor) -> str | None:
    """The first layer whose output is NaN or infinite on these images, if any."""
    bad: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def look(_: nn.Module, __: Any, out: Tensor) -> None:
            if not bool(torch.isfinite(out).all()):
                bad.append(name)

        return look

    handles = [graph.module.get_submodule(n).register_forward_hook(hook(n)) for n in graph.layers]
    graph.module(images)
    for handle in handles:
        handle.remove()
    return bad[0] if bad else None


def require_finite(
    values: Tensor, graph: QuantGraph, images: Tensor, *, otherwise: str | None = None
) -> None:
    """Raise for NaN and infinity, naming the layer where they begin.

    Args:
        values: what to check.
        graph: the network, to look for the layer.
        images: the images that it saw.
        otherwise: the layer to name when every layer's output is finite.

    Raises:
        DataError: `values` are not finite.
    """
    if not bool(torch.isfinite(values).all()):
        first = not_finite(graph, images) or otherwise or list(graph.layers)[-1]
        raise DataError(_NOT_FINITE.format(first))
