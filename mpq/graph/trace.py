"""Trace a model with torch.fx; what cannot be traced stays a leaf and is reported.

Module paths survive tracing and are the keys of a policy. When a module's forward cannot be traced
(a branch on values, a loop over a tensor), that module becomes a leaf of the graph and tracing
starts again; if the model's own forward is the culprit there is nothing to cut out, and the error
names file, line and remedy.
"""

from __future__ import annotations

import copy
import logging
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.errors import GraphError
from mpq.graph.attention import open_attention
from mpq.graph.ir import QuantGraph

logger = logging.getLogger(__name__)
MAX_LEAVES = 64


class _Tracer(fx.Tracer):
    """Remembers which module's forward is being traced, and keeps given paths as leaves."""

    def __init__(self, leaves: set[str]) -> None:
        super().__init__()
        self.leaves = leaves
        self.stack: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        known = module_qualified_name in self.leaves
        return known or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        path = self.path_of_module(m)
        self.stack.append(path)
        result = super().call_module(m, forward, args, kwargs)
        self.stack.pop()
        return result


def _cause(error: Exception) -> str:
    """`file:line: condition` of the user's frame that defeated the tracer."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = (str(Path(torch.__file__).parent), __file__)
    users = [f for f in frames if not f.filename.startswith(mine)]
    message = str(error).splitlines()[0] if str(error) else type(error).__name__
    if not users:
        return message
    last = users[-1]
    return f"{last.filename}:{last.lineno}: `{last.line}` ({message})"


def trace(model: nn.Module, example: Tensor) -> QuantGraph:
    """Trace a copy of `model` in eval mode.

    Args:
        model: any module with one tensor input and one tensor output.
        example: an input batch `[N, C, H, W]`; it is kept for shapes.

    Raises:
        GraphError: the model's own forward cannot be traced.
    """
    model = copy.deepcopy(model).eval()
    if isinstance(model, fx.GraphModule):
        return QuantGraph(model, example)
    open_attention(model, example)
    islands: dict[str, str] = {}
    for _ in range(MAX_LEAVES):
        tracer = _Tracer(set(islands))
        try:
            graph = tracer.trace(model)
        except Exception as error:
            cause = _cause(error)
            if not tracer.stack:
                raise GraphError(
                    f"{type(model).__name__}.forward must be traceable by torch.fx, but {cause}. "
                    "Move the untraceable part into a submodule of its own (it is then kept as it "
                    "is, with its Conv and Linear layers quantized), or replace a branch on values "
                    "by torch.where and a branch on shapes by constants."
                ) from None
            islands[tracer.stack[-1]] = cause
            logger.warning("%s is kept as it is: %s", tracer.stack[-1], cause)
            continue
        module = fx.GraphModule(model, graph, type(model).__name__).eval()
        return QuantGraph(module, example, islands=islands)
    raise GraphError(f"more than {MAX_LEAVES} modules cannot be traced; the first: {islands}")
