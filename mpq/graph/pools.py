"""Average pooling over the rim: the one form that torch and ONNX runtimes compute alike.

With `ceil_mode` the last window may hang over the input. torch divides by what of it lies in the
input and its padding, runtimes by the whole kernel unless padding is not counted
(`count_include_pad=False`). So zeros that count are added as a step of its own, and none is counted
in the pooling.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx, nn

from mpq.graph.functional import free_path
from mpq.graph.ir import QuantGraph
from mpq.graph.shapes import shapes

_NAMES = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_FUNCTIONS: dict[Any, type[nn.Module]] = {F.avg_pool1d: nn.AvgPool1d, F.avg_pool2d: nn.AvgPool2d}


def ceil_pools(qg: QuantGraph) -> int:
    """Rewrite average pooling in ceil mode; return how many there were."""
    graph, modules = qg.module.graph, dict(qg.module.named_modules(remove_duplicate=False))
    found = [(node, pool) for node in graph.nodes if (pool := _pool(node, modules)) is not None]
    sizes = shapes(qg) if found else {}
    for node, pool in found:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rim = _rim(tuple(sizes[source.name]), tuple(sizes[node.name]), pool)
        path = free_path(qg.module, f"{node.name}_pool")
        kind: Any = type(pool)
        alone = kind(pool.kernel_size, pool.stride, 0, ceil_mode=True, count_include_pad=False)
        qg.module.add_submodule(path, alone)
        with graph.inserting_before(node):
            if any(rim):
                source = graph.call_function(F.pad, (source, rim))
            call = graph.call_module(path, (source,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    return len(found)


def _pool(node: fx.Node, modules: dict[str, nn.Module]) -> Any:
    """The average pooling in ceil mode that a node is, if padding counts in it; else None."""
    pool: Any = modules.get(str(node.target)) if node.op == "call_module" else None
    if node.op == "call_function" and node.target in _FUNCTIONS:
        given = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
        given.pop("input", None)
        pool = _FUNCTIONS[node.target](**given)
    if type(pool) not in _FUNCTIONS.values() or getattr(pool, "divisor_override", None):
        return None
    return pool if pool.ceil_mode and pool.count_include_pad else None


def _rim(before: tuple[int, ...], after: tuple[int, ...], pool: Any) -> tuple[int, ...]:
    """Zeros to add, last dimension first: the padding, short of what would make a window more."""
    rank = 1 if isinstance(pool, nn.AvgPool1d) else 2
    rim: list[int] = []
    for dim in range(rank):
        size, windows = before[dim - rank], after[dim - rank]
        kernel, stride, padding = (
            value[dim] if isinstance(value, tuple) else value
            for value in (pool.kernel_size, pool.stride, pool.padding)
        )
        reach = (windows - 1) * stride + kernel - size - padding
        rim = [padding, max(0, min(padding, reach)), *rim]
    return tuple(rim)
