"""Make graphs uniform before anything else looks at them.

Nothing works in place; dropout and identity go; functional convolutions and matrix products of
parameters become modules; a module that is called several times gets one copy per call (sharing its
parameters), so that a node and a module path are the same thing; an `output_size` becomes a crop;
halves of a batch become slices; global means become `AdaptiveAvgPool2d(1)`, the form for which a
runtime has an integer kernel; average pooling in ceil mode counts as runtimes do; gated activations
become gate and product; attention over other than four dimensions becomes its products.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvTransposeNd

from mpq.graph.attention import open_products
from mpq.graph.functional import free_path, functional_layers
from mpq.graph.gates import open_gates
from mpq.graph.inplace import out_of_place
from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.pools import ceil_pools
from mpq.graph.shapes import ranks


def normalize(qg: QuantGraph) -> int:
    """Run all rewrites; return how many there were."""
    rewrites = (
        out_of_place,
        _positional_inputs,
        _drop_identities,
        _mean_slopes,
        functional_layers,
        _halves_of_a_batch,
        _split_shared,
        _output_sizes,
        _global_means,
        ceil_pools,
        open_gates,
        open_products,
    )
    return sum(rewrite(qg) for rewrite in rewrites)


def _modules(qg: QuantGraph) -> dict[str, nn.Module]:
    return dict(qg.module.named_modules(remove_duplicate=False))


def _positional_inputs(qg: QuantGraph) -> int:
    """Tensors that are given by keyword come first, where every later pass looks for them."""
    count = 0
    for node in qg.module.graph.nodes:
        named = [key for key in ("input", "tensors", "other") if key in node.kwargs]
        if named and node.op in ("call_function", "call_module", "call_method"):
            node.args = (*node.args, *(node.kwargs[key] for key in named))
            node.kwargs = {k: v for k, v in node.kwargs.items() if k not in named}
            count += 1
    return count


def _drop_identities(qg: QuantGraph) -> int:
    modules, count = _modules(qg), 0
    for node in list(qg.module.graph.nodes):
        if kind_of(node, modules) == "identity":
            node.replace_all_uses_with(node.args[0])
            qg.module.graph.erase_node(node)
            count += 1
    return count


def _mean_slopes(qg: QuantGraph) -> int:
    """`RReLU` draws its slopes in training only: else it is a leaky ReLU of their mean."""
    found = {path: m for path, m in _modules(qg).items() if type(m) is nn.RReLU}
    for path, module in found.items():
        qg.module.set_submodule(path, nn.LeakyReLU((module.lower + module.upper) / 2))
    return len(found)


def _halves_of_a_batch(qg: QuantGraph) -> int:
    """`chunk(x, 2, 0)` parts what was concatenated along the batch: by slices, at any batch size.

    The exporter holds chunks at the sizes of the example.
    """
    graph, count = qg.module.graph, 0
    for node in list(graph.nodes):
        if node.target not in (torch.chunk, "chunk") or _chunked(node) != (2, 0):
            continue
        if any(user.target is not operator.getitem for user in node.users):
            continue
        with graph.inserting_before(node):
            size = graph.call_method("size", (node.args[0], 0))
            half = graph.call_function(operator.floordiv, (size, 2))
            for user in list(node.users):
                rows = slice(half, None) if user.args[1] in (1, -1) else slice(None, half)
                user.args = (node.args[0], rows)
        graph.erase_node(node)
        count += 1
    return count


def _chunked(node: fx.Node) -> tuple[object, object]:
    """Number of chunks, and their dimension."""
    given = dict(zip(("chunks", "dim"), node.args[1:], strict=False)) | dict(node.kwargs)
    return given.get("chunks"), given.get("dim", 0)


def _split_shared(qg: QuantGraph) -> int:
    """One module per call: the first keeps its path, call k gets the path with `_k` appended.

    A call with the arguments of an earlier one gives nothing new, and goes.
    """
    modules = _modules(qg)
    calls: Counter[int] = Counter()
    made: dict[tuple[int, str], fx.Node] = {}
    count = 0
    for node in list(qg.module.graph.nodes):
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        first = made.setdefault((id(module), f"{node.args}{node.kwargs}"), node)
        if first is not node:
            node.replace_all_uses_with(first)
            qg.module.graph.erase_node(node)
            count += 1
            continue
        calls[id(module)] += 1
        if calls[id(module)] > 1:
            path = free_path(qg.module, f"{node.target}_{calls[id(module)]}")
            qg.module.add_submodule(path, _shallow(module))
            node.target = path
            count += 1
    return count


def _shallow(module: nn.Module) -> nn.Module:
    """A module of its own on the same parameters and buffers, all the way down."""
    memo: dict[int, object] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def _output_sizes(qg: QuantGraph) -> int:
    """A transposed convolution to an `output_size` gives the most it can, and is cropped to that.

    So the size may be that of another tensor. What folds into the layer comes before the crop.
    """
    graph, modules, count = qg.module.graph, _modules(qg), 0
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        given = [*node.args[1:], *node.kwargs.values()]
        if not isinstance(layer, _ConvTransposeNd) or not given:
            continue
        node.args, node.kwargs, count = node.args[:1], {}, count + 1
        if given[0] is None:
            continue
        ends = given[0][-len(layer.stride) :]
        if any(isinstance(end, int) for end in ends):
            qg.sizes = f"the output of {node.target} is cropped to {list(ends)}"
        layer.output_padding = tuple(step - 1 for step in layer.stride)
        last = node
        while [kind_of(n, modules) for n in last.users] in (["batch_norm"], ["relu"], ["relu6"]):
            (last,) = last.users
        readers = list(last.users)
        with graph.inserting_after(last):
            index: Any = (..., *(slice(None, end) for end in ends))
            crop = graph.call_function(operator.getitem, (last, index))
        for reader in readers:
            reader.replace_input_with(last, crop)
    return count


def _global_means(qg: QuantGraph) -> int:
    modules, count = _modules(qg), 0
    means = [n for n in qg.module.graph.nodes if kind_of(n, modules) == "mean"]
    dimensions = ranks(qg) if means else {}
    for node in list(qg.module.graph.nodes):
        if node in means:
            keepdim = _mean_over_space(node, dimensions.get(node.args[0].name, 0))
        elif kind_of(node, modules) == "adaptive_avgpool" and node.op == "call_function":
            size = node.args[1] if len(node.args) > 1 else node.kwargs.get("output_size")
            keepdim = True if size in (1, (1, 1), [1, 1]) else None
        else:
            continue
        if keepdim is None:
            continue
        path = free_path(qg.module, f"{node.name}_pool")
        qg.module.add_submodule(path, nn.AdaptiveAvgPool2d(1))
        with qg.module.graph.inserting_before(node):
            out = qg.module.graph.call_module(path, (node.args[0],))
            if not keepdim:
                out = qg.module.graph.call_function(torch.flatten, (out, 1))
        node.replace_all_uses_with(out)
        qg.module.graph.erase_node(node)
        count += 1
    return count


def _mean_over_space(node: fx.Node, rank: int) -> bool | None:
    """`keepdim` of a mean over height and width of an NCHW tensor; None for any other mean."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if rank != 4 or not isinstance(dims, (list, tuple)):
        return None
    if sorted(cast(int, d) % rank for d in dims) != [2, 3]:
        return None
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))
