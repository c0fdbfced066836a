"""The legal graph at each stage: the runner holds it against this after its passes.

A rule looks at one thing and yields what is wrong with it, as a sentence that names layer or site.

    float      layers are there as torch's own modules, and nothing is quantized
    annotated  plans and sites fit policy, layers and nodes; the modules are still those of `float`
    prepared   each planned layer is a QuantLayer, each site a FakeQuant after its node
    frozen     likewise FrozenLayer and FrozenQuant, integers within their formats
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import fx, nn

from mpq.errors import GraphError
from mpq.graph.ir import LayerPlan, QuantGraph, Stage
from mpq.graph.kinds import kind_of, moves
from mpq.quant.fake_quant import FakeQuant, FrozenQuant
from mpq.quant.layer import FrozenLayer, IslandLayer, QuantLayer
from mpq.quant.operation import LAYERS

Rule = Callable[[QuantGraph], Iterator[str]]
SHOWN = 3
"""Violations that a message names."""


def check(qg: QuantGraph, stage: Stage) -> None:
    """Refuse a graph that is not what its stage says.

    Raises:
        GraphError: it is not; the message names the first layers or sites and what is wrong.
    """
    wrong = [text for rule in RULES[stage] for text in rule(qg)]
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise GraphError(f"the graph is no {stage} one: {'; '.join(wrong[:SHOWN])}{more}.")


def _module(qg: QuantGraph, path: str) -> nn.Module | None:
    try:
        return qg.module.get_submodule(path)
    except AttributeError:
        return None


def _calls(qg: QuantGraph) -> dict[str, list[fx.Node]]:
    """Nodes that call a module, by its path."""
    found: dict[str, list[fx.Node]] = {}
    for node in qg.module.graph.nodes:
        if node.op == "call_module":
            found.setdefault(str(node.target), []).append(node)
    return found


# -- layers ---------------------------------------------------------------------------------------


def _layers_are_float(qg: QuantGraph) -> Iterator[str]:
    if not qg.layers:
        yield "it has no layers"
    for name in qg.layers:
        module = _module(qg, name)
        if type(module) not in LAYERS:
            yield f"layer {name} must be a float layer, but is a {type(module).__name__}"


def _nothing_is_quantized(qg: QuantGraph) -> Iterator[str]:
    for name, module in qg.module.named_modules():
        if isinstance(module, (FakeQuant, FrozenQuant, QuantLayer, FrozenLayer, IslandLayer)):
            yield f"{name} must not be there yet: it is a {type(module).__name__}"


def _plans_follow_the_policy(qg: QuantGraph) -> Iterator[str]:
    if qg.policy is None:
        yield "it has no policy"
        return
    for name in qg.plans.keys() - qg.layers.keys():
        yield f"there is a plan for {name}, which is no layer"
    for name in qg.layers.keys() - qg.plans.keys():
        yield f"layer {name} has no plan"
    asked = qg.policy.resolve(list(qg.layers))
    for name in qg.layers.keys() & qg.plans.keys():
        planned = qg.plans[name].choice
        if planned != asked[name]:
            yield f"layer {name} is planned as {planned.asked}, but asked for {asked[name].asked}"


def _plans_name_their_sites(qg: QuantGraph) -> Iterator[str]:
    calls = _calls(qg)
    for name, plan in qg.plans.items():
        if plan.site is not None and plan.site not in qg.sites:
            yield f"layer {name} reads from {plan.site}, which is no site"
        reads = plan.support.integer and not plan.choice.dynamic and name in calls
        if reads != (plan.site is not None):
            what = "needs a site, as it runs as integers" if reads else "must have no site"
            yield f"layer {name} {what}"


def _planned_layers_are(kind: type[QuantLayer] | type[FrozenLayer]) -> Rule:
    """Each planned layer is of this kind, or of an island with one of it, in its format."""

    def rule(qg: QuantGraph) -> Iterator[str]:
        calls = _calls(qg)
        for name, plan in qg.plans.items():
            module = _module(qg, name)
            if plan.support.stored is None:
                if type(module) not in LAYERS:
                    yield f"layer {name} must be in float, but is a {type(module).__name__}"
                continue
            inner = module if name in calls else getattr(module, "layer", None)
            if not isinstance(inner, kind):
                yield f"layer {name} must be a {kind.__name__}, but is a {type(module).__name__}"
                continue
            yield from (f"layer {name} {text}" for text in _unlike(inner, plan, qg))

    return rule


def _unlike(layer: QuantLayer | FrozenLayer, plan: LayerPlan, qg: QuantGraph) -> Iterator[str]:
    """What of a quantized layer is not as planned."""
    stored = plan.support.stored
    has = layer.goal if isinstance(layer, QuantLayer) else layer.spec
    if has != stored:
        yield f"must have weights {stored}, but has {has}"
    if layer.dynamic != (plan.choice.dynamic and plan.support.integer):
        yield "takes its range at run time" if layer.dynamic else "must take its range at run time"
    source = None if plan.site is None else _module(qg, plan.site)
    if isinstance(layer, QuantLayer) and plan.site is not None and layer.source is not source:
        yield f"must read the grid of {plan.site}"
    if isinstance(layer, FrozenLayer):
        if plan.site is not None and layer.x_scale is None:
            yield f"must know the step of {plan.site}"
        low, high = int(layer.weight.amin()), int(layer.weight.amax())
        if stored is not None and not (stored.qmin <= low and high <= stored.qmax):
            yield f"holds integers from {low} to {high}, beyond those of {stored}"


# -- sites ----------------------------------------------------------------------------------------


def _no_sites(qg: QuantGraph) -> Iterator[str]:
    yield from (f"{name} must not be there yet" for name in (*qg.sites, *qg.plans))


def _sites_have_nodes(qg: QuantGraph) -> Iterator[str]:
    names, seen = {n.name for n in qg.module.graph.nodes}, set()
    for name, site in qg.sites.items():
        if site.name != name:
            yield f"site {name} calls itself {site.name}"
        if site.node not in names:
            yield f"site {name} stands after node {site.node}, which is not in the graph"
        if site.node in seen:
            yield f"site {name}: node {site.node} is quantized twice"
        seen.add(site.node)
        for reader in site.readers:
            if reader not in qg.layers:
                yield f"site {name} is read by {reader}, which is no layer"


def _sites_are(kind: type[FakeQuant] | type[FrozenQuant]) -> Rule:
    """Each site has its quantizer, called once after its node; there are no others."""

    def rule(qg: QuantGraph) -> Iterator[str]:
        calls = _calls(qg)
        for name, site in qg.sites.items():
            module, nodes = _module(qg, name), calls.get(name, [])
            if not isinstance(module, kind):
                yield f"site {name} must have a {kind.__name__}, but has a {type(module).__name__}"
                continue
            has = module.goal if isinstance(module, FakeQuant) else module.spec
            if has != site.spec:
                yield f"site {name} must round to {site.spec}, but rounds to {has}"
            if [str(node.args[0]) for node in nodes] != [site.node]:
                where = [str(node.args[0]) for node in nodes] or "nothing"
                yield f"site {name} must be called after {site.node}, but is after {where}"
                continue
            rounded = nodes[0].all_input_nodes[0]
            for other in rounded.users.keys() - {nodes[0]}:
                yield f"site {name}: {other.name} reads {site.node} past the quantizer"
        for name in calls.keys() - qg.sites.keys():
            if isinstance(_module(qg, name), (FakeQuant, FrozenQuant)):
                yield f"{name} quantizes without being a site"

    return rule


def _quantized_once(qg: QuantGraph) -> Iterator[str]:
    """No quantizer reads what another has rounded, not even where values moved in between."""
    modules = dict(qg.module.named_modules())
    kinds = {node: kind_of(node, modules) for node in qg.module.graph.nodes}

    def rounds(node: fx.Node) -> bool:
        called = modules.get(str(node.target)) if node.op == "call_module" else None
        return isinstance(called, (FakeQuant, FrozenQuant))

    for node in filter(rounds, kinds):
        source = node.all_input_nodes[0]
        while moves(source, kinds):
            source = source.all_input_nodes[0]
        if rounds(source):
            yield f"{node.target} rounds again what {source.target} has rounded"


RULES: dict[Stage, tuple[Rule, ...]] = {
    "traced": (),
    "float": (_layers_are_float, _nothing_is_quantized, _no_sites),
    "annotated": (
        _layers_are_float,
        _nothing_is_quantized,
        _plans_follow_the_policy,
        _plans_name_their_sites,
        _sites_have_nodes,
    ),
    "prepared": (
        _plans_follow_the_policy,
        _plans_name_their_sites,
        _sites_have_nodes,
        _planned_layers_are(QuantLayer),
        _sites_are(FakeQuant),
        _quantized_once,
    ),
    "frozen": (
        _plans_follow_the_policy,
        _plans_name_their_sites,
        _sites_have_nodes,
        _planned_layers_are(FrozenLayer),
        _sites_are(FrozenQuant),
        _quantized_once,
    ),
}
