"""The legal graph at each stage: the runner holds it against this after its passes.

A rule looks at one thing and yields what is wrong with it, as a sentence that names layer or site.

    float      layers are there as torch's own modules, and nothing is quantized
    annotated  plans and sites fit policy, layers and nodes; the modules are still those of `float`
    prepared   each planned layer is a QuantLayer, each site a FakeQuant after its node
    frozen     likewise FrozenLayer and FrozenQuant, integers within their formats
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx, nn

from mpq.errors import GraphError
from mpq.graph.ir import LayerPlan, QuantGraph, Stage
from mpq.graph.kinds import kind_of, moves
from mpq.quant.fake_quant import FakeQuant, FrozenQuant
from mpq.quant.layer import FrozenLayer, IslandLayer, QuantLayer
from mpq.quant.operation import LAYERS
from mpq.spec import QuantSpec

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
            if isinstance(module, IslandLayer):
                yield from (f"island {name} {text}" for text in _unlike_island(module, plan))

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


def _unlike_island(island: IslandLayer, plan: LayerPlan) -> Iterator[str]:
    """What of an island's own quantizers is not as planned: they are no sites of the graph."""
    layer, choice = island.layer, plan.choice
    assert isinstance(layer, (QuantLayer, FrozenLayer))
    rounds = (plan.support.integer or choice.exact) and not choice.dynamic
    inside = choice.activation if rounds else None
    outside = inside if plan.support.integer and layer.op.kind != "linear" else None
    kind = FakeQuant if isinstance(layer, QuantLayer) else FrozenQuant
    for part, asked in (("input", inside), ("output", outside)):
        module = getattr(island, part)
        has = _format(module) if isinstance(module, kind) else None
        if has != asked or (asked is None and not isinstance(module, nn.Identity)):
            what = f"is a {type(module).__name__}" if has is None else f"rounds to {has}"
            must = "pass it on" if asked is None else f"round to {asked}"
            yield f"must {must} at its {part}, but {what}"
    reads = island.input if inside is not None and plan.support.integer else None
    if isinstance(layer, QuantLayer):
        if layer.source is not reads:
            yield "must read the grid of its own input"
    elif not _same_step(layer.x_scale, None if reads is None else reads.scale):
        yield "must know the step of its own input"


def _same_step(known: Tensor | None, own: object) -> bool:
    return known is own is None or (
        isinstance(known, Tensor) and isinstance(own, Tensor) and torch.equal(known, own)
    )


def _format(quantizer: FakeQuant | FrozenQuant) -> QuantSpec:
    return quantizer.goal if isinstance(quantizer, FakeQuant) else quantizer.spec


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
    """Each site has its quantizer, called once after its node."""

    def rule(qg: QuantGraph) -> Iterator[str]:
        calls = _calls(qg)
        for name, site in qg.sites.items():
            module, nodes = _module(qg, name), calls.get(name, [])
            if not isinstance(module, kind):
                yield f"site {name} must have a {kind.__name__}, but has a {type(module).__name__}"
                continue
            if _format(module) != site.spec:
                yield f"site {name} must round to {site.spec}, but rounds to {_format(module)}"
            if [str(node.args[0]) for node in nodes] != [site.node]:
                where = [str(node.args[0]) for node in nodes] or "nothing"
                yield f"site {name} must be called after {site.node}, but is after {where}"
                continue
            rounded = nodes[0].all_input_nodes[0]
            for other in rounded.users.keys() - {nodes[0]}:
                yield f"site {name}: {other.name} reads {site.node} past the quantizer"

    return rule


def _sites_are_as_wide_as_asked(qg: QuantGraph) -> Iterator[str]:
    """A site has the widest of the widths that its integer readers ask for."""
    for name, site in qg.sites.items():
        plans = [qg.plans[reader] for reader in site.readers if reader in qg.plans]
        asked = [plan.choice.activation_bits or 0 for plan in plans if plan.support.integer]
        if asked and site.spec.bits != max(asked):
            yield f"site {name} has {site.spec.bits} bits, but {max(asked)} are asked for"


def _nothing_else_is_quantized(qg: QuantGraph) -> Iterator[str]:
    """Every quantizer is a site or an island's own, every quantized layer has a plan."""
    islands = {n for n, m in qg.module.named_modules() if isinstance(m, IslandLayer)} & {*qg.plans}
    own = {f"{name}.{part}" for name in islands for part in ("input", "layer", "output")}
    for name, module in qg.module.named_modules():
        if name in own:
            continue
        if isinstance(module, (FakeQuant, FrozenQuant)) and name not in qg.sites:
            yield f"{name} quantizes without being a site"
        if isinstance(module, (QuantLayer, FrozenLayer)) and name not in qg.plans:
            yield f"{name} is a {type(module).__name__} without a plan"


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
        _sites_are_as_wide_as_asked,
    ),
    "prepared": (
        _plans_follow_the_policy,
        _plans_name_their_sites,
        _sites_have_nodes,
        _planned_layers_are(QuantLayer),
        _sites_are(FakeQuant),
        _sites_are_as_wide_as_asked,
        _nothing_else_is_quantized,
        _quantized_once,
    ),
    "frozen": (
        _plans_follow_the_policy,
        _plans_name_their_sites,
        _sites_have_nodes,
        _planned_layers_are(FrozenLayer),
        _sites_are(FrozenQuant),
        _sites_are_as_wide_as_asked,
        _nothing_else_is_quantized,
        _quantized_once,
    ),
}
