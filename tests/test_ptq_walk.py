"""The walk over a prepared graph, node by node, and what is decided at a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import nets
import pytest
import torch
from torch import Tensor, fx, nn

from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare, to_float
from mpq.hooks import hooked
from mpq.policy import Policy
from mpq.ptq import calibrate
from mpq.ptq.sequential import quantize_layers
from mpq.ptq.store import ActivationStore
from mpq.ptq.walk import FLOAT, QUANTIZED, LockStep, evaluate
from mpq.quant.layer import QuantLayer

BATCH = nets.images(12)


def calibrated(bits: int = 4) -> tuple[QuantGraph, QuantGraph]:
    floats = to_float(nets.build("residual"), BATCH[:2])
    graph = prepare(floats, Policy.uniform(bits, 8))
    calibrate(graph, BATCH)
    return floats, graph


@pytest.fixture
def walk() -> Iterator[LockStep]:
    _, graph = calibrated()
    with ActivationStore(2**20) as store, torch.no_grad():
        yield LockStep(graph.module.eval(), torch.split(BATCH, 5), store)


def go(walk: LockStep) -> fx.Node:
    """Walk to the end; the last node."""
    for node in walk.module.graph.nodes:
        walk.keep(node, walk.run(node, QUANTIZED), walk.run(node, FLOAT))
    return node


@torch.no_grad()
def test_evaluating_node_by_node_is_running_the_graph():
    _, graph = calibrated()
    interpreter = fx.Interpreter(graph.module)
    values: dict[fx.Node, Tensor] = {}
    for node in graph.module.graph.nodes:
        given = node.op == "placeholder"
        values[node] = BATCH if given else evaluate(interpreter, node, values.__getitem__)
    assert torch.equal(values[node], graph.module(BATCH))


def test_both_networks_end_at_their_answers_and_leave_nothing(walk: LockStep):
    output = next(n for n in walk.module.graph.nodes if n.op == "output")
    walk.hold(output)
    go(walk)
    ends = [torch.cat([v.get() for v in walk.values[k][output]]) for k in (QUANTIZED, FLOAT)]
    floats, _ = calibrated()
    torch.testing.assert_close(ends[FLOAT], floats.module(BATCH))
    wanted = torch.cat([walk.module(part) for part in walk.parts])
    assert torch.equal(ends[QUANTIZED], wanted)
    walk.release(output)
    assert walk.values == ({}, {})
    assert walk.store.used == 0


def test_renewed_values_are_those_that_later_nodes_read(walk: LockStep):
    first, second, *_ = walk.module.graph.nodes
    walk.hold(first)
    walk.keep(first, walk.run(first, QUANTIZED), walk.run(first, FLOAT))
    walk.renew(first, [walk.store.put(torch.zeros_like(part)) for part in walk.parts])
    assert all(float(v.get().abs().max()) == 0 for v in walk.run(second, QUANTIZED))
    assert any(float(v.get().abs().max()) > 0 for v in walk.run(second, FLOAT))


@torch.no_grad()
def test_scales_keep_an_integer_bias_below_its_limit():
    _, graph = calibrated()
    layer = next(m for m in graph.module.modules() if isinstance(m, QuantLayer))
    assert layer.bias is not None
    layer.weight[0], layer.bias[0] = 0.0, 5.0
    quantize_layers(graph, BATCH)
    assert bool((layer.scale >= layer.least_step()).all())
    layer.set_scale(torch.zeros_like(layer.scale))
    assert torch.equal(layer.scale, layer.least_step())
    assert float(layer.scale[0]) > 0


def means(graph: QuantGraph) -> dict[str, Tensor]:
    """Mean output of each channel of each layer, by layer."""
    found: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _m, _args, out: found.update({name: out.transpose(0, 1).flatten(1).mean(1)})

    layers = {name: graph.module.get_submodule(name) for name in graph.layers}
    with hooked(layer.register_forward_hook(note(name)) for name, layer in layers.items()):
        graph.module.eval()(BATCH)
    return found


@torch.no_grad()
def test_bias_correction_gives_each_channel_the_mean_that_it_had():
    wanted = means(calibrated()[0])
    off = {}
    for corrected in (False, True):
        _, graph = calibrated(bits=3)
        quantize_layers(graph, BATCH, learn_rounding=False, correct_bias=corrected)
        got = means(graph)
        off[corrected] = {n: float((got[n] - wanted[n]).abs().max()) for n in wanted}
    for name, left in off[True].items():
        layer = graph.module.get_submodule(name)
        step = layer.source.step() * layer.constants().scale  # of its bias, which is an integer
        assert left <= 1.01 * float(step.max()), name
        assert name == "conv1" or left < 0.1 * off[False][name], name


def test_no_images_and_other_stages_are_refused():
    floats, graph = calibrated()
    with pytest.raises(UsageError, match="at least one image"):
        quantize_layers(graph, BATCH[:0])
    with pytest.raises(ValueError, match="needs a prepared graph"):
        quantize_layers(floats, BATCH)
