"""Put the annotated quantizers into the graph: reads `sites` and `plans`, knows no policy."""

from __future__ import annotations

from torch import fx, nn

from mpq.graph.ir import LayerPlan, QuantGraph
from mpq.graph.kinds import kind_of
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import IslandLayer, QuantLayer


def insert(qg: QuantGraph) -> int:
    """Insert a `FakeQuant` per site and replace each planned layer; return the number of both."""
    nodes = {n.name: n for n in qg.module.graph.nodes}
    modules = dict(qg.module.named_modules())
    quantizers: dict[str, FakeQuant] = {}
    for site in qg.sites.values():
        quantizer = FakeQuant(site.spec, site.ceiling)
        node = nodes[site.node]
        if kind_of(node, modules) == "relu6":
            _relu6_to_relu(qg.module, node)
        qg.module.add_submodule(site.name, quantizer)
        with qg.module.graph.inserting_after(node):
            call = qg.module.graph.call_module(site.name, (node,))
        node.replace_all_uses_with(call, delete_user_cb=lambda user, call=call: user is not call)
        quantizers[site.name] = quantizer
    count = len(quantizers)
    traced = {str(n.target) for n in nodes.values() if n.op == "call_module"}
    for name, plan in qg.plans.items():
        if plan.support.stored is not None:
            _replace(qg.module, name, plan, quantizers, name in traced)
            count += 1
    return count


def _relu6_to_relu(module: fx.GraphModule, node: fx.Node) -> None:
    """The quantizer saturates at 6 or below, so only the lower bound is left to do."""
    if node.op == "call_module":
        module.set_submodule(str(node.target), nn.ReLU())
    else:
        node.target = nn.functional.relu
        node.args, node.kwargs = node.args[:1], {}


def _replace(
    module: fx.GraphModule,
    name: str,
    plan: LayerPlan,
    quantizers: dict[str, FakeQuant],
    traced: bool,
) -> None:
    layer, spec = module.get_submodule(name), plan.support.stored
    assert spec is not None
    source = quantizers[plan.site] if plan.site else None
    if traced:
        dynamic = plan.choice.dynamic and plan.support.integer
        new: nn.Module = QuantLayer(layer, spec, source, dynamic=dynamic)
    else:
        rounds = plan.support.integer or plan.choice.exact
        activation = plan.choice.activation if rounds else None
        new = IslandLayer.of(layer, spec, activation)
    module.set_submodule(name, new)
