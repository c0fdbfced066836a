"""Cut a graph into blocks with one tensor in and one tensor out.

After a node at which a single tensor is alive, the network goes on through that tensor alone: a
place to cut. Between two cuts lies a node of a chain, or a region with branches such as a residual
block. What is learned together is such a region; layers of a chain are taken `CHAIN` at a time
(Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021,
finds the residual block to be the best unit).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer

CHAIN = 3
"""Layers of a chain that make a block, as in an inverted residual without its shortcut."""


@dataclass(frozen=True)
class Block:
    """Successive nodes of a graph.

    Args:
        nodes: in order of execution.
        entry: the node outside whose value is all that they read; None where the graph begins.
        exit: the node whose value is all that is read of them; None where the graph ends before
            there is one.
        layers: paths of the quantized layers that they call.
    """

    nodes: tuple[fx.Node, ...]
    entry: fx.Node | None
    exit: fx.Node | None
    layers: tuple[str, ...]


def blocks(module: fx.GraphModule) -> list[Block]:
    """The blocks of a prepared graph: every node is in one of them."""
    found: list[Block] = []
    current: list[fx.Node] = []
    entry: fx.Node | None = None
    chain = True
    for segment, begin in _segments(module.graph):
        layers = _layers(module, segment)
        have = _layers(module, current)
        single = len(segment) == 1
        full = bool(have) and not (chain and single and len(have) < CHAIN)
        if layers and current and (full or not have):
            found.append(_block(module, current, entry, begin))
            current, entry, chain = [], begin, True
        if layers:
            chain = chain and single
        current.extend(segment)
    if current:
        # the last node of every graph is its output: what it takes of the others, if that is one
        given = [n for n in current[-1].all_input_nodes if n in current]
        found.append(_block(module, current, entry, given[0] if len(given) == 1 else None))
    return found


def counts_samples(node: fx.Node) -> bool:
    """Whether a node only says how many samples an input of the network has."""
    if (node.op, node.target, node.args[1:]) != ("call_method", "size", (0,)):
        return False
    given, module = node.all_input_nodes[0], node.graph.owning_module
    assert module is not None
    while given.op == "call_module" and isinstance(
        module.get_submodule(str(given.target)), FakeQuant
    ):
        given = given.all_input_nodes[0]
    return given.op == "placeholder"


def _block(
    module: fx.GraphModule, nodes: list[fx.Node], entry: fx.Node | None, end: fx.Node | None
) -> Block:
    return Block(tuple(nodes), entry, end if end in nodes else None, tuple(_layers(module, nodes)))


def _layers(module: fx.GraphModule, nodes: list[fx.Node]) -> list[str]:
    called = [str(n.target) for n in nodes if n.op == "call_module"]
    return [name for name in called if isinstance(module.get_submodule(name), QuantLayer)]


def _segments(graph: fx.Graph) -> list[tuple[list[fx.Node], fx.Node | None]]:
    """Nodes from cut to cut, each with the tensor that was alive where it begins."""
    nodes = list(graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    last = {n: max((place[u] for u in n.users if u.op != "output"), default=-1) for n in nodes}
    found: list[tuple[list[fx.Node], fx.Node | None]] = []
    alive: set[fx.Node] = set()
    segment: list[fx.Node] = []
    begin: fx.Node | None = None
    for i, node in enumerate(nodes):
        segment.append(node)
        if node.op != "get_attr" and not counts_samples(node):  # these are at hand everywhere
            alive.add(node)
        alive = {n for n in alive if last[n] > i}
        if len(alive) <= 1:
            found.append((segment, begin))
            segment, begin = [], next(iter(alive), None)
    if segment:
        found.append((segment, begin))
    return found
