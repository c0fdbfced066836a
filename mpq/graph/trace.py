"""A network as the graph that all passes work on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpq.capture.capture import capture
from mpq.capture.network import Network
from mpq.errors import GraphError
from mpq.graph.ir import QuantGraph


def trace(model: nn.Module, example: Tensor) -> QuantGraph:
    """Capture a copy of `model` in eval mode (`mpq.capture`).

    Args:
        model: any module with one tensor input and one tensor output.
        example: an input batch `[N, C, H, W]`; it is kept for shapes.

    Raises:
        GraphError: the model cannot be captured, or is not one of float32.
    """
    _check_precision(model)
    captured = capture(Network(model, (example,)))
    return QuantGraph(captured.module, example, islands=captured.islands)


def _check_precision(model: nn.Module) -> None:
    """Refuse weights of another precision: scales and integers follow from float32."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype != torch.float32:
            raise GraphError(
                f"the weights of {type(model).__name__} must be float32. Got {name} as "
                f"{str(weight.dtype).removeprefix('torch.')}. Call .float() on the model, which "
                "loses nothing, and give it float32 inputs."
            )
