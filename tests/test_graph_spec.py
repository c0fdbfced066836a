"""Passes that leave a half-done graph behind: each is caught, by its name and by what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from nets import NETS, build, calibrate, images
from torch import nn

from mpq.errors import GraphError
from mpq.export import to_onnx
from mpq.graph.annotate import annotate
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, run, to_float
from mpq.graph.spec import check
from mpq.policy import LayerPolicy, Policy
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.spec import ROUNDED_16, activation_spec, weight_spec

POLICY = Policy.uniform(4).with_layers(LayerPolicy(name="head.2", weight="float"))
LAYER, SITE = "conv1", "quantizers.x"


@cache
def made(stage: str) -> QuantGraph:
    floats = to_float(build("residual"), images())
    if stage == "float":
        return floats
    if stage == "annotated":
        copy = floats.copy()
        return run(copy, (lambda qg: annotate(qg, POLICY),), needs="float", gives="annotated")
    graph = calibrate(prepare(floats, POLICY), images())
    return graph if stage == "prepared" else freeze(graph)


def put(path: str, new: Callable[[QuantGraph], nn.Module]) -> Callable[[QuantGraph], None]:
    return lambda qg: qg.module.set_submodule(path, new(qg))


def thawed(path: str) -> Callable[[QuantGraph], None]:
    return put(path, lambda qg: made("prepared").module.get_submodule(path))


def conv(qg: QuantGraph) -> nn.Conv2d:
    return nn.Conv2d(*qg.module.get_submodule(LAYER).weight.shape[1::-1], 3, padding=1)


def wide(qg: QuantGraph) -> nn.Module:
    return QuantLayer(conv(qg), weight_spec(8), qg.module.get_submodule(SITE))


def stranger(qg: QuantGraph) -> nn.Module:
    return QuantLayer(conv(qg), weight_spec(4), FakeQuant(activation_spec(8)))


def call(qg: QuantGraph):
    return next(n for n in qg.module.graph.nodes if n.target == SITE)


def uncalled(qg: QuantGraph) -> None:
    node = call(qg)
    node.replace_all_uses_with(node.args[0])
    qg.module.graph.erase_node(node)


def past(qg: QuantGraph) -> None:
    """The layer reads the tensor itself, as if the quantizer were not there."""
    node = call(qg)
    reader = next(n for n in node.users if n.target == LAYER)
    reader.args = (node.args[0],)


def again(qg: QuantGraph) -> None:
    node = call(qg)
    qg.module.add_submodule("more", FakeQuant(activation_spec(8)))
    with qg.module.graph.inserting_after(node):
        flat = qg.module.graph.call_method("contiguous", (node,))
    with qg.module.graph.inserting_after(flat):
        qg.module.graph.call_module("more", (flat,))


def change(table: str, key: str, **values: object) -> Callable[[QuantGraph], None]:
    def damage(qg: QuantGraph) -> None:
        entries = getattr(qg, table)
        entries[key] = replace(entries[key], **values)

    return damage


def drop(table: str, key: str) -> Callable[[QuantGraph], None]:
    return lambda qg: getattr(qg, table).pop(key)


def copied(table: str, key: str, name: str) -> Callable[[QuantGraph], None]:
    def damage(qg: QuantGraph) -> None:
        entries = getattr(qg, table)
        entries[name] = entries[key]

    return damage


def replanned(qg: QuantGraph) -> None:
    qg.plans[LAYER] = replace(qg.plans[LAYER], choice=qg.plans["head.2"].choice)


def resited(qg: QuantGraph) -> None:
    """Site and quantizer agree with each other, and not with the policy."""
    qg.sites[SITE] = replace(qg.sites[SITE], spec=activation_spec(4))
    if qg.stage == "prepared":
        quantizer = qg.module.get_submodule(SITE)
        quantizer.spec = quantizer.goal = activation_spec(4)


def integers(value: int) -> Callable[[QuantGraph], None]:
    return lambda qg: qg.module.get_submodule(LAYER).weight.fill_(value)


def set_to(path: str, name: str, value: object) -> Callable[[QuantGraph], None]:
    return lambda qg: setattr(qg.module.get_submodule(path), name, value)


DAMAGES: list[tuple[str, Callable[[QuantGraph], object], str]] = [
    ("float", lambda qg: qg.layers.clear(), "it has no layers"),
    ("float", put(LAYER, lambda qg: nn.Identity()), "conv1 must be a float layer, .* Identity"),
    ("float", put("q", lambda qg: FakeQuant(activation_spec(8))), "q must not be there yet"),
    ("float", put("q", lambda qg: nn.Identity()), ""),
    ("annotated", lambda qg: setattr(qg, "policy", None), "it has no policy"),
    ("annotated", drop("plans", LAYER), "layer conv1 has no plan"),
    ("annotated", copied("plans", LAYER, "conv9"), "a plan for conv9, which is no layer"),
    ("annotated", replanned, "conv1 is planned as W32A8, but asked for W4A8"),
    ("annotated", change("plans", LAYER, site=None), "conv1 needs a site"),
    ("annotated", change("plans", "head.2", site=SITE), "head.2 must have no site"),
    ("annotated", drop("sites", SITE), "reads from quantizers.x, which is no site"),
    ("annotated", change("sites", SITE, node="gone"), "after node gone, which is not in the"),
    ("annotated", change("sites", SITE, readers=("conv9",)), "read by conv9, which is no layer"),
    ("annotated", copied("sites", SITE, "quantizers.y"), "node x is quantized twice"),
    ("annotated", put(LAYER, lambda qg: nn.Identity()), "conv1 must be a float layer"),
    ("prepared", put(LAYER, conv), "layer conv1 must be a QuantLayer, but is a Conv2d"),
    ("prepared", put(LAYER, wide), "conv1 must have weights int4/channel, but has int8/channel"),
    ("prepared", put(LAYER, stranger), "conv1 must read the grid of quantizers.x"),
    ("prepared", set_to(LAYER, "dynamic", True), "conv1 takes its range at run time"),
    ("prepared", put("head.2", wide), "head.2 must be in float, but is a QuantLayer"),
    ("prepared", put(SITE, lambda qg: nn.Identity()), "quantizers.x must have a FakeQuant, but"),
    ("prepared", change("sites", SITE, spec=activation_spec(4)), "must round to uint4/tensor, but"),
    ("prepared", uncalled, "must be called after x, but is after nothing"),
    ("prepared", past, "conv1 reads x past the quantizer"),
    ("prepared", again, "more quantizes without being a site; more rounds again what quant"),
    ("prepared", put("more", stranger), "more is a QuantLayer without a plan"),
    ("annotated", resited, "quantizers.x has 4 bits, but 8 are asked for"),
    ("prepared", resited, "quantizers.x has 4 bits, but 8 are asked for"),
    ("prepared", lambda qg: setattr(qg, "policy", Policy.uniform(8)), "but asked for W8A8"),
    ("frozen", thawed(LAYER), "layer conv1 must be a FrozenLayer, but is a QuantLayer"),
    ("frozen", thawed(SITE), "quantizers.x must have a FrozenQuant, but has a FakeQuant"),
    ("frozen", integers(8), "holds integers from 8 to 8, beyond those of int4/channel"),
    ("frozen", set_to(LAYER, "x_scale", None), "conv1 must know the step of quantizers.x"),
    ("frozen", set_to(LAYER, "spec", weight_spec(8)), "must have weights int4/channel, but has"),
]


@pytest.mark.parametrize(("stage", "damage", "wrong"), DAMAGES)
def test_a_half_done_graph_is_caught(
    stage: str, damage: Callable[[QuantGraph], object], wrong: str
) -> None:
    graph = made(stage).copy()

    def careless(qg: QuantGraph) -> int:
        damage(qg)
        return 1

    if not wrong:  # what nobody forbids
        run(graph, (careless,), needs=stage, gives=stage)
        return
    told = rf"after pass careless: the graph is no {stage} one: .*{wrong}"
    with pytest.raises(GraphError, match=told):
        run(graph, (careless,), needs=stage, gives=stage)


ISLE = "gate.conv"


@cache
def island(stage: str, *, exact: bool = False) -> QuantGraph:
    """A network with a convolution inside a module that cannot be traced."""
    choice = LayerPolicy(name=ISLE, weight="int16/channel", activation=str(ROUNDED_16))
    policy = Policy.uniform(8).with_layers(*([choice] if exact else []))
    graph = calibrate(prepare(to_float(build("island"), images()), policy), images())
    return graph if stage == "prepared" else freeze(graph)


ISLAND_DAMAGES: list[tuple[str, Callable[[QuantGraph], object], str]] = [
    ("prepared", put(f"{ISLE}.input", lambda qg: nn.Identity()), "round to uint8/tensor at its in"),
    ("prepared", put(f"{ISLE}.output", lambda qg: nn.Identity()), "round to uint8/tensor at its o"),
    ("prepared", put(f"{ISLE}.output", lambda qg: nn.ReLU()), "at its output, but is a ReLU"),
    ("prepared", put(f"{ISLE}.input", lambda qg: FakeQuant(activation_spec(4))), "rounds to uint4"),
    ("prepared", put(f"{ISLE}.input", lambda qg: FakeQuant(activation_spec(8))), "read the grid"),
    ("frozen", set_to(f"{ISLE}.layer", "x_scale", None), "must know the step of its own input"),
    ("frozen", set_to(f"{ISLE}.layer", "x_scale", torch.tensor(2.0)), "must know the step of its"),
    (
        "frozen",
        put(f"{ISLE}.input", lambda qg: island("prepared").module.get_submodule(f"{ISLE}.input")),
        "must round to uint8/tensor at its input, but is a FakeQuant",
    ),
]


@pytest.mark.parametrize(("stage", "damage", "wrong"), ISLAND_DAMAGES)
def test_a_half_done_island_is_caught(
    stage: str, damage: Callable[[QuantGraph], object], wrong: str
) -> None:
    graph = island(stage).copy()
    check(graph, stage)
    damage(graph)
    with pytest.raises(GraphError, match=rf"island {ISLE} .*{wrong}"):
        check(graph, stage)


def test_an_island_that_is_rounded_to_16_bits_passes_its_output_on() -> None:
    graph = island("frozen", exact=True).copy()
    check(graph, "frozen")
    quantizer = graph.module.get_submodule(f"{ISLE}.input")
    graph.module.set_submodule(f"{ISLE}.output", quantizer)
    with pytest.raises(GraphError, match="must pass it on at its output, but rounds to uint16"):
        check(graph, "frozen")


@pytest.mark.parametrize("name", NETS)
def test_every_network_is_legal_at_every_stage(name: str):
    floats = to_float(build(name), images())
    widths = ("int4/channel", "int16/channel", "float", "int8/channel")
    entries = [LayerPolicy(name=n, weight=widths[i % 4]) for i, n in enumerate(floats.layers)]
    graph = calibrate(prepare(floats, Policy().with_layers(*entries)), images())
    check(graph, "prepared")
    check(freeze(graph), "frozen")
    for stage in ("annotated", "frozen"):
        with pytest.raises(GraphError, match=f"the graph is no {stage} one"):
            check(graph, stage)


def test_a_graph_that_is_not_what_was_asked_is_not_exported(tmp_path: Path):
    """Wider integers would have been clipped on the way into a narrower type, in silence."""
    graph = made("frozen").copy()
    with torch.no_grad():
        graph.module.get_submodule(LAYER).weight[0, 0, 0, 0] = 9
    with pytest.raises(GraphError, match=r"layer conv1 holds integers from -?[0-9]+ to 9"):
        to_onnx(graph, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
