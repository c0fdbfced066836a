"""The graph that a training step runs: without the ReLUs that quantizers make redundant.

A quantizer whose zero point is the lowest integer saturates at zero, so a ReLU before it changes
nothing, forward or backward; but it costs a pass over the tensor each way. The exported graph keeps
it, for it is what runtimes look for.
"""

from __future__ import annotations

from torch import fx, nn

from mpq.graph.kinds import kind_of
from mpq.quant.fake_quant import FakeQuant


def drop_redundant_relus(module: fx.GraphModule) -> fx.GraphModule:
    """A graph of the same modules and parameters that trains as `module` does, and sooner.

    Zero points must not move while it is used (they are not trained); `module` is not changed.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    modules = dict(module.named_modules())
    for node in list(graph.nodes):
        if kind_of(node, modules) == "relu" and _redundant(node, modules):
            node.replace_all_uses_with(node.all_input_nodes[0])
            graph.erase_node(node)
    return fx.GraphModule(module, graph)


def _redundant(relu: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether all that reads this ReLU saturates at zero, and nothing else reads its input.

    Of an input with other readers a ReLU in place would change what they see.
    """
    (source,) = relu.all_input_nodes
    readers = [modules.get(str(user.target)) for user in relu.users]
    return len(source.users) == 1 and len(readers) > 0 and all(map(_saturates, readers))


def _saturates(reader: nn.Module | None) -> bool:
    return (
        isinstance(reader, FakeQuant)
        and reader.enabled
        and int(reader.zero_point) == reader.spec.qmin == 0
    )
