"""A network as the graph that all passes work on."""

from __future__ import annotations

from torch import nn

from mpq.calls import Inputs, count
from mpq.capture.capture import capture
from mpq.capture.network import Network, check_module
from mpq.graph.ir import QuantGraph


def trace(model: nn.Module, example: Inputs | Network) -> QuantGraph:
    """Capture a copy of a network in eval mode (`mpq.capture`).

    Args:
        model: any module.
        example: a call (`Network.of`) whose tensors have the batch as first size; it is kept for
            shapes.

    Raises:
        GraphError: the model cannot be captured, or `mpq.capture.network` refuses it.
        UsageError: the tensors of the example differ in their first size.
    """
    check_module(model)
    network = Network.of(model, example)
    example = network.map(lambda t: t.detach().clone()).example
    count(example)
    made = capture(network)
    return QuantGraph(
        made.module, example, islands=made.islands, frozen=made.frozen, sizes=made.sizes
    )
