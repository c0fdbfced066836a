"""Live norms: nothing changes in eval mode when they come and go, and training normalizes."""

from __future__ import annotations

import copy

import nets
import pytest
import torch

from mpq import policies
from mpq.errors import GraphError, UsageError
from mpq.graph.norms import absorb_norms, attach_norms, freeze_norms
from mpq.graph.passes import freeze, prepare, to_float
from mpq.ptq import quantize_graph
from mpq.quant.layer import QuantLayer
from mpq.quant.norm import LiveNorm

NORMED = ("residual", "depthwise", "one_dimension", "transposed")


def prepared(name: str, policy: str = "w4a8"):
    images = nets.images(16)
    graph = prepare(to_float(nets.build(name), images[:2]), policies.load(policy))
    return quantize_graph(graph, images), images


def live(graph) -> list[LiveNorm]:
    return [m for m in graph.module.modules() if isinstance(m, LiveNorm)]


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("policy", ["w4a8", "w16a16"])
def test_norms_come_without_a_change(name: str, policy: str):
    graph, images = prepared(name, policy)
    with torch.no_grad():
        before = graph.module(images)
        count = attach_norms(graph, images)
        after = graph.module(images)
    assert count == len(live(graph)) > 0
    # One integer may fall on the other side of a tie when its scale moves by a rounding error.
    assert float((after - before).square().mean().sqrt()) < 0.02 * float(before.std())
    assert attach_norms(graph, images) == 0  # they are there


@pytest.mark.parametrize("name", NORMED)
def test_training_starts_where_eval_mode_stands(name: str):
    graph, images = prepared(name)
    attach_norms(graph, images)
    with torch.no_grad():
        evaluated = copy.deepcopy(graph).module.eval()(images)
        trained = graph.module.train()(images)
    assert float((trained - evaluated).square().mean().sqrt()) < 0.1 * float(evaluated.std())


@pytest.mark.parametrize("name", NORMED)
@pytest.mark.parametrize("policy", ["w4a8", "w8a8", "w16a16"])
def test_norms_go_without_a_change_of_a_bit(name: str, policy: str):
    graph, images = prepared(name, policy)
    attach_norms(graph, images)
    optimizer = torch.optim.SGD(graph.module.parameters(), lr=0.05)
    graph.module.train()
    for _ in range(3):
        optimizer.zero_grad()
        graph.module(images).square().mean().backward()
        optimizer.step()
    graph.module.eval()
    with torch.no_grad():
        trained, early = graph.module(images), freeze(graph).module(images)
        assert absorb_norms(graph) > 0
        assert not live(graph)
        assert torch.equal(graph.module(images), trained)
        assert torch.equal(freeze(graph).module(images), trained)
    assert torch.equal(early, trained)
    assert not any("norm" in key for key in graph.module.state_dict())


def test_a_norm_that_turns_negative_or_dies_is_mended():
    graph, images = prepared("residual", "w8a8")
    attach_norms(graph, images)
    with torch.no_grad():
        for norm in live(graph):
            norm.weight[0] *= -1
            norm.weight[1] = 0
            norm.bias[1] = 3.0
        before = graph.module(images)
        assert bool(before.isfinite().all())
        absorb_norms(graph)
        assert torch.allclose(graph.module(images), before, atol=1e-4)
    for layer in (graph.module.get_submodule(name) for name in graph.folded):
        x_scale = layer.source.step().detach()
        found = layer.constants()
        assert float(found.bias[1]) == pytest.approx(3.0, abs=1.0)
        assert float((found.bias / (x_scale * found.scale)).abs().max()) < 2**31


def test_frozen_norms_use_and_keep_their_statistics():
    graph, images = prepared("residual")
    attach_norms(graph, images)
    norm = live(graph)[0]
    kept = norm.running_mean.clone()
    freeze_norms(graph.module.train(), True)
    graph.module(images + 1)
    assert torch.equal(norm.running_mean, kept)
    freeze_norms(graph.module, False)
    graph.module(images + 1)
    assert not torch.equal(norm.running_mean, kept)


def test_only_layers_that_had_a_norm_get_one():
    graph, images = prepared("residual")
    attach_norms(graph, images)
    for name, module in graph.module.named_modules():
        if isinstance(module, QuantLayer):
            assert (module.norm is not None) == (name in graph.folded)
            assert (module.bias is None) == (module.norm is not None)
    linear = [
        m for m in graph.module.modules() if isinstance(m, QuantLayer) and m.op.kind == "linear"
    ]
    assert linear
    assert all(m.norm is None for m in linear)


def test_norms_want_a_prepared_graph_and_images():
    images = nets.images(4)
    graph = to_float(nets.build("residual"), images[:2])
    with pytest.raises(GraphError, match=r"needs a prepared graph\. Got stage 'float'"):
        attach_norms(graph, images)
    ready = prepare(graph, policies.load("w8a8"))
    with pytest.raises(UsageError, match="at least one image"):
        attach_norms(ready, images[:0])
