"""Functions on weights become modules: a layer is a layer, whoever wrote it how.

`F.conv2d(x, self.weight, self.bias)` is a convolution, and its module stands at the path of the
module that owns the weight, where nothing else is called there; a user's subclass of `nn.Conv2d`
keeps its name so. Weights that the forward computes from other weights (weight standardization, a
user's hook) are taken as what they come to. Batch norm on statistics is a module too, so that it is
folded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpq.graph.ir import QuantGraph
from mpq.graph.shapes import ranks

logger = logging.getLogger(__name__)
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONV[:5], "output_padding", "groups", "dilation")
_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")

LAYERS: dict[Callable[..., Any], tuple[type[nn.Module], tuple[str, ...]]] = {
    F.conv1d: (nn.Conv1d, _CONV),
    F.conv2d: (nn.Conv2d, _CONV),
    F.conv3d: (nn.Conv3d, _CONV),
    F.conv_transpose1d: (nn.ConvTranspose1d, _TRANSPOSED),
    F.conv_transpose2d: (nn.ConvTranspose2d, _TRANSPOSED),
    F.linear: (nn.Linear, _CONV[:3]),
    F.batch_norm: (nn.BatchNorm2d, _NORM),
}
"""The module of each function, and the names of the function's arguments."""
TENSORS = ("weight", "bias", "running_mean", "running_var")


def functional_layers(qg: QuantGraph) -> int:
    """Replace them all; return how many there were."""
    graph = qg.module.graph
    made: dict[str, nn.Module] = {}
    norms = any(n.target is F.batch_norm for n in graph.nodes)
    dimensions = ranks(qg) if norms else {}  # while the graph still runs
    read: set[str] = set()
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in LAYERS:
            continue
        given = dict(zip(LAYERS[node.target][1], node.args, strict=False)) | dict(node.kwargs)
        layer = _as_module(qg, node, given, dimensions)
        if layer is None:
            continue
        sources = _sources(given)
        home = _home(qg, node, given, sources)
        path = home or free_path(qg.module, [*sources, node.name][0].replace(".", "_"))
        if not home:
            qg.module.add_submodule(path, layer)
        made[path] = layer
        with graph.inserting_before(node):
            call = graph.call_module(path, (given["input"],))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        read.update(sources)
    graph.eliminate_dead_code()  # what computed a weight reads the module that the layer replaces
    for path, layer in made.items():
        qg.module.set_submodule(path, layer)
    _forget(qg, read)
    return len(made)


def free_path(module: nn.Module, wish: str) -> str:
    """The path wished for, or the next one at which nothing is."""
    taken = dict(module.named_modules(remove_duplicate=False))
    path, k = wish, 1
    while path in taken or hasattr(module, path):
        path, k = f"{wish}_{k}", k + 1
    return path


def _tensors(given: dict[str, Any]) -> dict[str, fx.Node]:
    """The nodes of weight, bias and statistics, by the name of the argument."""
    return {key: given[key] for key in TENSORS if given.get(key) is not None}


def _sources(given: dict[str, Any]) -> list[str]:
    """Paths of the network's tensors that a layer's are or come from, the weight's first."""
    found = [n for part in _tensors(given).values() for n in _ancestors(part)]
    return list(dict.fromkeys(str(n.target) for n in found if n.op == "get_attr"))


def _as_module(
    qg: QuantGraph, node: fx.Node, given: dict[str, Any], dimensions: dict[str, int]
) -> nn.Module | None:
    """The module of a call; None where a weight depends on the input, or an option on a size."""
    tensors = _tensors(given)
    if set(node.all_input_nodes) - {given["input"], *tensors.values()}:
        return None
    values = {key: _value(qg, part) for key, part in tensors.items()}
    if any(value is None for value in values.values()):
        return None
    if node.target is F.batch_norm:
        if "running_mean" not in values or given.get("training"):
            return None
        return _norm(dimensions[node.name], values, given)
    for key, part in tensors.items():
        if part.op != "get_attr":
            logger.info("the %s of %s is computed: taken as what it comes to", key, node.name)
    return _layer(node, values, given)


def _layer(node: fx.Node, values: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    """A layer around weights; made on `meta`, so that no random number is drawn for it."""
    kind, names = cast(Any, LAYERS[cast(Any, node.target)])
    weight, bias = values["weight"], values.get("bias")
    if kind is nn.Linear:
        layer = kind(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    else:
        options = {name: given[name] for name in names[3:] if name in given}
        groups = given.get("groups", 1)
        one, other = weight.shape[0], weight.shape[1] * groups
        inputs, outputs = (one, other) if names is _TRANSPOSED else (other, one)
        layer = kind(inputs, outputs, tuple(weight.shape[2:]), bias=bias is not None,
                     device="meta", **options)  # fmt: skip
    layer.weight = _parameter(weight)
    layer.bias = None if bias is None else _parameter(bias)  # type: ignore[assignment]
    return cast(nn.Module, layer)


def _norm(rank: int, values: dict[str, Any], given: dict[str, Any]) -> nn.Module:
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(rank, nn.BatchNorm1d)
    mean, weight, bias = (values.get(key) for key in ("running_mean", "weight", "bias"))
    assert mean is not None
    options = {"eps": given.get("eps", 1e-5), "momentum": given.get("momentum", 0.1)}
    norm = kind(len(mean), affine=weight is not None, device="meta", **options)
    norm.running_mean, norm.running_var = mean, values["running_var"]
    norm.num_batches_tracked = torch.zeros((), dtype=torch.long, device=mean.device)
    if weight is not None:
        norm.weight = _parameter(weight)
        norm.bias = _parameter(torch.zeros_like(weight) if bias is None else bias)
    return norm.eval()  # a later rewrite may run the graph, and its statistics must not move


def _parameter(value: Tensor) -> nn.Parameter:
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _value(qg: QuantGraph, node: fx.Node) -> Tensor | None:
    """What a node gives, if the input has no part in it; None otherwise."""
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(qg.module.get_submodule(owner), name)
        return value if isinstance(value, Tensor) else None
    needed = _ancestors(node)
    if any(n.op == "placeholder" for n in needed):
        return None
    work = fx.Interpreter(qg.module)
    with torch.no_grad():
        for n in (n for n in qg.module.graph.nodes if n in needed):
            work.env[n] = work.run_node(n)
    value = work.env[node]
    return value if isinstance(value, Tensor) else None


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and all that it is computed from, nearest first."""
    found = {node: None}
    for one in (waiting := [node]):
        new = [n for n in one.all_input_nodes if n not in found]
        found |= dict.fromkeys(new)
        waiting += new
    return list(found)


def _home(qg: QuantGraph, node: fx.Node, given: dict[str, Any], sources: list[str]) -> str:
    """The path of the module that owns the layer's tensors, or an empty string.

    The layer can take its place if it holds no modules, is not called itself, and nothing else
    reads what is computed from its tensors.
    """
    home = sources[0].rpartition(".")[0] if sources else ""
    if not home or list(qg.module.get_submodule(home).children()):
        return ""
    tensors = _tensors(given)
    named = {k: str(n.target) for k, n in tensors.items() if n.op == "get_attr"}
    if any(path != f"{home}.{key}" for key, path in named.items()):
        return ""
    own = {node, *(n for part in tensors.values() for n in _ancestors(part))}
    for other in qg.module.graph.nodes:
        if other.op == "call_module" and other.target == home:
            return ""
        mine = other.op == "get_attr" and str(other.target).startswith(f"{home}.")
        if mine and not own.issuperset(other.users):
            return ""
    return home


def _forget(qg: QuantGraph, targets: set[str]) -> None:
    """Delete tensors that no node reads any more, so that no state of theirs stays behind."""
    used = {str(n.target) for n in qg.module.graph.nodes if n.op in ("get_attr", "call_module")}
    for target in targets - used:
        owner, _, name = target.rpartition(".")
        if not any(f"{owner}.".startswith(f"{path}.") for path in used):
            delattr(qg.module.get_submodule(owner), name)
