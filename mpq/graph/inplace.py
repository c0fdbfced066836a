"""Operations that overwrite their input become ones that make a new tensor.

What a graph means should not hang on what shares memory: every later pass moves values (after a
quantizer, into an exported file, out of a backward pass) as if a node's value never changed.
Recording has seen to it that whoever reads an overwritten tensor reads the node that did it, and
that operators (`x += y`) are plain ones.
"""

from __future__ import annotations

import inspect

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpq.graph.ir import QuantGraph


def out_of_place(qg: QuantGraph) -> int:
    """Rewrite them all; return how many there were."""
    modules = dict(qg.module.named_modules())
    return sum(_rewrite(node, modules) for node in qg.module.graph.nodes)


def _rewrite(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Give a node that overwrites its first input the form that does not; False for others."""
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        module = modules[str(node.target)]
        found = getattr(module, "inplace", False) is True
        if found:
            module.inplace = False  # type: ignore[assignment]
        return found
    if node.op == "call_method":
        pure = str(node.target).removesuffix("_")
        found = pure != node.target and callable(getattr(Tensor, pure, None))
        if found:
            node.target = pure
        return found
    if node.op == "call_function":
        return _rewrite_function(node)
    return False


def _rewrite_function(node: fx.Node) -> bool:
    assert callable(node.target)
    name, pure = getattr(node.target, "__name__", ""), None
    for home in (torch, F):
        if name.endswith("_") and getattr(home, name, None) is node.target:
            pure = getattr(home, name.removesuffix("_"), None)
    if pure is not None:
        node.target = pure
        return True
    if node.kwargs.get("inplace"):
        node.kwargs = {**node.kwargs, "inplace": False}
        return True
    try:
        place = list(inspect.signature(node.target).parameters).index("inplace")
    except (TypeError, ValueError):  # no such parameter, or a function of C, which tells none
        return False
    found = len(node.args) > place and node.args[place] is True
    if found:
        node.update_arg(place, False)
    return found
