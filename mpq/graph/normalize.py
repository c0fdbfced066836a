"""Make graphs uniform before anything else looks at them.

Nothing works in place; dropout and identity go; functional convolutions and matrix products of
parameters become modules; a module that is called several times gets one copy per call (sharing its
parameters), so that a node and a module path are the same thing; global means become
`AdaptiveAvgPool2d(1)`, the form for which a runtime has an integer kernel; gated activations become
gate and product.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any, cast

import torch
from torch import fx, nn

from mpq.graph.gates import open_gates
from mpq.graph.inplace import out_of_place
from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.shapes import ranks


def normalize(qg: QuantGraph) -> int:
    """Run all rewrites; return how many there were."""
    rewrites = (
        out_of_place,
        _positional_inputs,
        _drop_identities,
        _functional_layers,
        _split_shared,
        _global_means,
        open_gates,
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


def _parameter(qg: QuantGraph, node: object) -> nn.Parameter | None:
    if isinstance(node, fx.Node) and node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(qg.module.get_submodule(owner), name)
        return value if isinstance(value, nn.Parameter) else None
    return None


def _functional_layers(qg: QuantGraph) -> int:
    modules, count = _modules(qg), 0
    replaced: set[str] = set()
    for node in list(qg.module.graph.nodes):
        kind = kind_of(node, modules)
        if kind not in ("functional_conv", "functional_linear"):
            continue
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        weight = _parameter(qg, given.get("weight"))
        bias = _parameter(qg, given.get("bias"))
        if weight is None or (given.get("bias") is not None and bias is None):
            continue  # weights that are computed: not a layer
        layer = _as_module(kind, weight, bias, given)
        path = _free_path(qg, str(given["weight"].target).replace(".", "_"))
        qg.module.add_submodule(path, layer)
        with qg.module.graph.inserting_before(node):
            call = qg.module.graph.call_module(path, (given["input"],))
        node.replace_all_uses_with(call)
        qg.module.graph.erase_node(node)
        count += 1
        replaced.update(str(n.target) for n in (given["weight"], given.get("bias")) if n)
    qg.module.graph.eliminate_dead_code()
    _forget(qg, replaced)
    return count


def _forget(qg: QuantGraph, targets: set[str]) -> None:
    """Delete parameters that no node reads any more, so that no state of theirs stays behind."""
    used = {str(n.target) for n in qg.module.graph.nodes if n.op in ("get_attr", "call_module")}
    for target in targets - used:
        owner, _, name = target.rpartition(".")
        if not any(f"{owner}.".startswith(f"{path}.") for path in used):
            delattr(qg.module.get_submodule(owner), name)


def _as_module(
    kind: str, weight: nn.Parameter, bias: nn.Parameter | None, given: dict[str, Any]
) -> nn.Module:
    """A module around parameters; made on `meta`, so that no random number is drawn for it."""
    layer: nn.Module
    if kind == "functional_linear":
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        groups, kernel = given.get("groups", 1), cast(Any, tuple(weight.shape[2:]))
        layer = (nn.Conv1d if weight.ndim == 3 else nn.Conv2d)(
            weight.shape[1] * groups,
            weight.shape[0],
            kernel,
            given.get("stride", 1),
            given.get("padding", 0),
            given.get("dilation", 1),
            groups,
            bias is not None,
            device="meta",
        )
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def _free_path(qg: QuantGraph, wish: str) -> str:
    """The path wished for, or the next one that no module has."""
    path, taken, k = wish, _modules(qg), 1
    while path in taken or hasattr(qg.module, path):
        path, k = f"{wish}_{k}", k + 1
    return path


def _split_shared(qg: QuantGraph) -> int:
    """One module per call: the first keeps its path, call k gets the path with `_k` appended."""
    modules = _modules(qg)
    calls: Counter[int] = Counter()
    count = 0
    for node in qg.module.graph.nodes:
        if node.op != "call_module":
            continue
        module = modules[str(node.target)]
        calls[id(module)] += 1
        if calls[id(module)] > 1:
            path = _free_path(qg, f"{node.target}_{calls[id(module)]}")
            qg.module.add_submodule(path, _shallow(module))
            node.target = path
            count += 1
    return count


def _shallow(module: nn.Module) -> nn.Module:
    """A module of its own on the same parameters and buffers, all the way down."""
    memo: dict[int, object] = {id(t): t for t in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


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
        path = _free_path(qg, f"{node.name}_pool")
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
