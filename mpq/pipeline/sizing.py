"""What a small network's file takes besides its tensors: one file is lowered and thrown away.

`mpq.analyze.cost` knows tensors to the byte, and has averages for nodes, names and metadata. Of a
large network these are a fraction of a percent; of a file of some kilobytes they are most of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mpq.analyze.cost import Allocation
from mpq.analyze.search import Search
from mpq.checkpoint import weights_hash
from mpq.errors import MpqError
from mpq.graph.besides import GRAPH
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare
from mpq.policy import Constraints, Policy
from mpq.ptq import quantize_graph
from mpq.quant.layer import FloatLayer, float_layer

logger = logging.getLogger(__name__)
SHARE = 0.05
"""Of a file, besides its tensors: the averages are right to a fifth of it."""

LIST_BYTES = len('"layers":[],')
"""Of the policy in a file, once any layer differs from the default."""


def sized(search: Search, graph: QuantGraph, policy: Callable[[Allocation], Policy]) -> Search:
    """The search, knowing what a file of the network really takes where averages are not enough.

    Args:
        search: whose `scores.besides` has averages.
        graph: in stage `float`; it is not changed.
        policy: makes the policy of an allocation, as it will travel in the file.
    """
    widest, target = search.allocate(Constraints()), search.target
    averages = target.bytes_per_file
    averages += sum(target.bytes_per_layer.get(bits, 0) for bits, _ in widest.widths.values())
    averages += sum(part.bytes for part in search.scores.besides if part.kind == GRAPH)
    if averages < SHARE * widest.bytes:
        return search
    named = policy(widest)
    more = excess(graph, named, widest.bytes - (0 if named.layers else LIST_BYTES))
    return taking(search, more) if more else search


def excess(graph: QuantGraph, policy: Policy, most: float) -> int:
    """Bytes of the file of a float graph above so many; 0 where it cannot be lowered."""
    try:
        return file_bytes(graph, policy) - int(most)
    except MpqError as error:
        logger.warning("mpq export will refuse this network, and sizes are estimates: %s", error)
        return 0


def taking(search: Search, more: int) -> Search:
    """The search, of a file that takes so many bytes more whatever the widths."""
    besides = tuple(
        replace(part, bytes=part.bytes + more) if part.kind == GRAPH else part
        for part in search.scores.besides
    )
    return replace(search, scores=replace(search.scores, besides=besides))


def file_bytes(graph: QuantGraph, policy: Policy) -> int:
    """Bytes of the file of a float graph under a policy, whatever its values.

    A weight that layers share is counted for each of them, as it is stored where they get other
    widths, or are rounded by what each reads: the file may be smaller, and is never larger.

    Raises:
        ExportError: an operation cannot be lowered.
    """
    from mpq.export.lower import form_for, lower  # a second of import that large networks save
    from mpq.export.onnx_file import serialize

    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return torch.rand(tensor.shape, generator=generator).to(tensor)

    graph = graph.copy()
    for layer in _repeated(graph):
        layer.weight = nn.Parameter(layer.weight.detach() + noise(layer.weight))
    prepared = prepare(graph, policy)
    images = pytree.tree_map_only(Tensor, noise, prepared.example)
    frozen = freeze(quantize_graph(prepared, images, method="minmax", effort="fast"))
    return len(serialize(lower(frozen, form_for(frozen))))


def _repeated(graph: QuantGraph) -> list[FloatLayer]:
    """Layers that have the weights of an earlier one: a file holds equal tensors once."""
    seen: set[str] = set()
    found = []
    for name in graph.layers:
        layer = float_layer(graph.module.get_submodule(name))
        known = weights_hash({"": layer.weight})
        found += [layer] if known in seen else []
        seen.add(known)
    return found
