"""A network as the graph that all passes work on."""

from __future__ import annotations

import torch
from torch import nn

from mpq.calls import Inputs, count
from mpq.capture.capture import capture
from mpq.capture.network import Network
from mpq.errors import GraphError
from mpq.graph.ir import QuantGraph


def trace(model: nn.Module, example: Inputs | Network) -> QuantGraph:
    """Capture a copy of a network in eval mode (`mpq.capture`).

    Args:
        model: any module.
        example: a call (`Network.of`) whose tensors have the batch as first size; it is kept for
            shapes.

    Raises:
        GraphError: the model cannot be captured, or is not one of float32.
        UsageError: the tensors of the example differ in their first size.
    """
    network = Network.of(model, example)
    _check_precision(network.module)
    example = network.map(lambda t: t.detach().clone()).example
    count(example)
    made = capture(network)
    return QuantGraph(
        made.module, example, islands=made.islands, frozen=made.frozen, sizes=made.sizes
    )


def _check_precision(model: nn.Module) -> None:
    """Refuse weights of another precision: scales and integers follow from float32."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise GraphError(
                f"the weights of {type(model).__name__} must be float32. Got {name} as "
                f"{str(weight.dtype).removeprefix('torch.')}. Call .float() on the model, which "
                "loses nothing, and give it float32 inputs."
            )
