"""A network as the graph that all passes work on."""

from __future__ import annotations

from torch import Tensor, nn

from mpq.capture.capture import capture
from mpq.capture.network import Network
from mpq.graph.ir import QuantGraph


def trace(model: nn.Module, example: Tensor) -> QuantGraph:
    """Capture a copy of `model` in eval mode (`mpq.capture`).

    Args:
        model: any module with one tensor input and one tensor output.
        example: an input batch `[N, C, H, W]`; it is kept for shapes.

    Raises:
        GraphError: the model cannot be captured.
    """
    captured = capture(Network(model, (example,)))
    return QuantGraph(captured.module, example, islands=captured.islands)
