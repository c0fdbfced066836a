"""Run the example through a graph: what is only known once tensors have a shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mpq.calls import arguments, call, described, take
from mpq.errors import GraphError
from mpq.graph.ir import QuantGraph


def run_example(qg: QuantGraph, interpreter: fx.Interpreter) -> Any:
    """The answer to one image of the example, without gradients.

    Raises:
        GraphError: the model cannot run on it.
    """
    try:
        with torch.no_grad():
            return interpreter.run(*arguments(qg.module, take(qg.example, slice(1))))
    except Exception as error:
        shapes, why = described(qg.example), str(error).partition("\n")[0]
        if _runs(qg):
            raise GraphError(
                f"the model must answer to one sample but runs on several only: {why}. A norm that "
                "takes the statistics of the batch in eval mode too needs running ones: build it "
                "with track_running_stats=True, and train."
            ) from error
        raise GraphError(
            f"the model must run on {shapes} but fails: {why}. Give the shape that it was made for."
        ) from error


@torch.no_grad()
def _runs(qg: QuantGraph) -> bool:
    """Whether the graph runs on the whole example."""
    try:
        call(qg.module, qg.example)
    except Exception:
        return False
    return True


def shapes(qg: QuantGraph) -> dict[str, torch.Size]:
    """The shape of each node's tensor for one image, by node name."""
    found: dict[str, torch.Size] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> object:
            out = super().run_node(n)
            if isinstance(out, Tensor):
                found[n.name] = out.shape
            return out

    run_example(qg, Record(qg.module))
    return found


def ranks(qg: QuantGraph) -> dict[str, int]:
    """The number of dimensions of each node's tensor, by node name."""
    return {name: len(shape) for name, shape in shapes(qg).items()}
