"""Which tensors are alive at one time while an image passes: what peak memory is made of.

A tensor lives from the node that makes it to the last that reads it, in the order of the graph. A
ReLU that is alone in reading its input works in its place; reshaping, slicing and transposing are
views. What holds a tensor's bits is the grid that it lies on: the activation width of the layers
that read it, 8 bits where only additions and the like do, 32 where it is never quantized.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from mpq.graph.annotate import annotate
from mpq.graph.ir import QuantGraph, Site
from mpq.graph.kinds import kind_of
from mpq.graph.shapes import shapes
from mpq.layers import LiveSet
from mpq.policy import Policy
from mpq.target import MOVING_OPS

IN_PLACE = frozenset({"relu", "relu6"})
VIEWS = frozenset({"flatten", "identity", "slice", "split", "transpose"})
FLOAT_BITS, GRID_BITS = 32, 8


def live_sets(qg: QuantGraph) -> tuple[LiveSet, ...]:
    """The live sets of a pass, without those that another contains; `qg` is not changed.

    Args:
        qg: a graph in stage `float`.
    """
    found = list(dict.fromkeys(_Liveness(qg).walk()))
    holding: dict[str, list[LiveSet]] = defaultdict(list)
    for held in found:
        for name, _ in held.layers:
            holding[name].append(held)
    return tuple(m for m in found if not _contained(m, found, holding))


def _contained(held: LiveSet, found: list[LiveSet], holding: dict[str, list[LiveSet]]) -> bool:
    """Whether another set contains this one; it must hold this one's layers."""
    others = holding[held.layers[0][0]] if held.layers else found
    return any(other is not held and held.within(other) for other in others)


class _Liveness:
    """Storages of a graph: the node that begins each, its bits and its lifetime."""

    def __init__(self, qg: QuantGraph) -> None:
        annotated = replace(qg, sites={}, plans={})
        annotate(annotated, Policy.uniform(GRID_BITS))
        self.moving = MOVING_OPS | VIEWS
        self.sites = {site.node: site for site in annotated.sites.values()}
        modules = dict(qg.module.named_modules())
        self.nodes = [n for n in qg.module.graph.nodes if n.op != "output"]
        self.kinds = {n: kind_of(n, modules) for n in self.nodes}
        self.elements = {name: shape.numel() for name, shape in shapes(qg).items()}
        members: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.nodes:
            members[self.root(node)].append(node)
        place = {n: i for i, n in enumerate(qg.module.graph.nodes)}
        self.life = {
            root: (place[root], max(place[u] for n in nodes for u in (n, *n.users)))
            for root, nodes in members.items()
            if root.op != "get_attr" and root.name in self.elements
        }
        self.owner = {root: self.site(members[root]) for root in self.life}

    def root(self, node: fx.Node) -> fx.Node:
        """The node whose storage a node's value lies in."""
        while node.args and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            alone = self.kinds[node] in IN_PLACE and len(source.users) == 1
            if not (alone or self.kinds[node] in VIEWS):
                break
            node = source
        return node

    def site(self, members: list[fx.Node]) -> Site | None:
        """The quantizer whose grid a storage lies on."""
        for node in members:
            while node.name not in self.sites and self.kinds[node] in self.moving and node.args:
                if not isinstance(node.args[0], fx.Node):
                    break
                node = node.args[0]
            if node.name in self.sites:
                return self.sites[node.name]
        return None

    def walk(self) -> Iterator[LiveSet]:
        """What is alive while each storage is being written."""
        alive: list[fx.Node] = []
        for root, (first, _) in self.life.items():
            alive = [*(r for r in alive if self.life[r][1] >= first), root]
            yield self.live_set(alive)

    def live_set(self, alive: list[fx.Node]) -> LiveSet:
        """The sum of some storages."""
        fixed = 0
        layers: dict[str, int] = defaultdict(int)
        for root in alive:
            site, count = self.owner[root], self.elements[root.name]
            if site is not None and site.readers:
                layers[site.readers[0]] += count
            else:
                fixed += count * (FLOAT_BITS if site is None else GRID_BITS)
        return LiveSet(fixed, tuple(sorted(layers.items())))
