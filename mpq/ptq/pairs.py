"""Pairs of layers whose shared channels may be rescaled without changing the network.

`f(c x) = c f(x)` for `c > 0` holds for ReLU, LeakyReLU, PReLU, pooling, zero padding and
flattening, so the outputs of a layer can be multiplied per channel and the inputs of the next
divided. It does not hold for ReLU6, which saturates: there a channel is free only as far as it
provably stays below 6, that is where the layer's own input lies in 0..6 and `b + 6 sum(max(w, 0))
<= 6`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.shapes import shapes
from mpq.quant.layer import float_layer
from mpq.quant.operation import LayerOp

HOMOGENEOUS = ("relu", "maxpool", "avgpool", "global_avgpool", "adaptive_avgpool")
CEILING = 6.0
Sizes = dict[str, torch.Size]


@dataclass(frozen=True)
class Link:
    """Two layers in a chain.

    Args:
        first: path of the layer that writes the channels.
        second: path of the one that reads them.
        limit: `[C]`, the factor by which each channel may at most be multiplied; channels of 1 stay
            as they are.
        reason: why no channel may be rescaled, or an empty string.
        leaky: whether a LeakyReLU or PReLU lies between, whose input is stored as well.
    """

    first: str
    second: str
    limit: Tensor
    reason: str = ""
    leaky: bool = False


def links(qg: QuantGraph) -> list[Link]:
    """All chains of two layers in a float graph, in order of execution."""
    modules = dict(qg.module.named_modules())
    sizes = shapes(qg)
    owners = Counter(id(modules[name].weight) for name in qg.layers if name in modules)
    found = []
    for node in qg.module.graph.nodes:
        name = str(node.target)
        if kind_of(node, modules) != "layer" or name not in qg.layers:
            continue
        path = _chain(node, modules, sizes)
        if path is None or str(path[-1].target) not in qg.layers:
            continue
        second = str(path[-1].target)
        channels = qg.layers[name].out_channels
        if any(owners[id(modules[n].weight)] > 1 for n in (name, second)):
            found.append(Link(name, second, torch.ones(channels), "a layer is called twice"))
        elif any(kind_of(n, modules) == "relu6" for n in path):
            limit = _below_ceiling(node, modules, channels)
            fixed = "" if bool((limit > 1).any()) else "every channel may reach the 6 of its ReLU6"
            found.append(Link(name, second, limit, fixed))
        else:
            free = torch.full((channels,), torch.inf)
            found.append(Link(name, second, free, leaky=any(_leaky(n, modules) for n in path)))
    return found


def _chain(node: fx.Node, modules: dict[str, nn.Module], sizes: Sizes) -> list[fx.Node] | None:
    """From a layer to the next one, if nothing else reads what lies between."""
    path, at = [node], node
    while True:
        users = list(at.users)
        if len(users) != 1:
            return None
        before, at = at, users[0]
        path.append(at)
        kind = kind_of(at, modules)
        if kind == "layer":
            matched = at.args[0] is before and _same_channels(path, modules, sizes)
            return path if matched else None
        if not (
            kind in (*HOMOGENEOUS, "relu6")
            or _leaky(at, modules)
            or _zero_pad(at, kind)
            or (kind == "flatten" and _flattens(sizes.get(before.name), sizes.get(at.name)))
        ):
            return None


def _leaky(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    called = node.op == "call_function" and node.target is F.leaky_relu
    return called or type(module) in (nn.LeakyReLU, nn.PReLU)


def _flattens(before: torch.Size | None, after: torch.Size | None) -> bool:
    """Whether all of an image's values become one row, channel after channel."""
    return bool(before and after and len(after) == 2 and before[0] == after[0])


def _zero_pad(node: fx.Node, kind: str) -> bool:
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    sides = node.args[1] if len(node.args) > 1 else ()
    # Four numbers pad height and width; more would add channels.
    spatial = isinstance(sides, (tuple, list)) and len(sides) <= 4
    return kind == "pad" and mode == "constant" and value in (None, 0, 0.0) and spatial


def _same_channels(path: list[fx.Node], modules: dict[str, nn.Module], sizes: Sizes) -> bool:
    """Whether the channels that the last layer reads are those that the first one writes."""
    first, last = (LayerOp.of(modules[str(path[k].target)]) for k in (0, -1))
    flattened = len(sizes[path[0].name]) != len(sizes[path[-2].name])
    if first.kind == "linear":
        return last.kind == "linear" and len(path) <= 3 and not flattened
    return flattened if last.kind == "linear" else not flattened


def _below_ceiling(node: fx.Node, modules: dict[str, nn.Module], channels: int) -> Tensor:
    """How far each channel of a layer before a ReLU6 may grow and provably never reach 6."""
    source = node.args[0]
    while isinstance(source, fx.Node) and kind_of(source, modules) in ("maxpool", "avgpool"):
        source = source.args[0]
    fixed = torch.ones(channels)
    layer = float_layer(modules[str(node.target)])
    if LayerOp.of(layer).kind == "conv_transpose" or not isinstance(source, fx.Node):
        return fixed
    if kind_of(source, modules) != "relu6":
        return fixed
    highest = CEILING * layer.weight.detach().clamp(min=0).flatten(1).sum(1)
    if layer.bias is not None:
        highest = highest + layer.bias.detach()
    room = CEILING / highest.clamp(min=1e-6)
    return torch.where(highest <= CEILING, room.clamp(min=1), fixed)
