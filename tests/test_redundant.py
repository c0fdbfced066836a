"""The graph of a training step without redundant ReLUs: the same numbers."""

from __future__ import annotations

import copy

import nets
import pytest
import torch

from mpq import attach_norms, policies, prepare, quantize_graph, to_float
from mpq.graph.redundant import drop_redundant_relus


def prepared(name: str):
    images = nets.images(8)
    graph = prepare(to_float(nets.build(name), images[:2]), policies.load("w4a8"))
    quantize_graph(graph, images)
    attach_norms(graph, images)
    return graph, images


@pytest.mark.parametrize(
    ("name", "left_out"), [("plain", 2), ("residual", 3), ("depthwise", 3), ("island", 1)]
)
def test_it_trains_as_the_whole_graph(name: str, left_out: int):
    graph, images = prepared(name)
    whole = copy.deepcopy(graph.module).train()
    nodes = len(graph.module.graph.nodes)
    step = drop_redundant_relus(graph.module.train())
    assert len(graph.module.graph.nodes) == nodes
    assert len(step.graph.nodes) == nodes - left_out
    out, expected = step(images), whole(images)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    pairs = zip(graph.module.named_parameters(), whole.parameters(), strict=True)
    for (key, a), b in pairs:
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=key)
    buffers = zip(graph.module.buffers(), whole.buffers(), strict=True)
    assert all(torch.equal(a, b) for a, b in buffers)
    with torch.no_grad():
        assert torch.equal(step.eval()(images), whole.eval()(images))


def test_a_relu_that_clips_what_its_quantizer_would_not_stays():
    graph, _ = prepared("plain")
    sites = [s for s in graph.sites if graph.sites[s].role != "input"]
    before = len(drop_redundant_relus(graph.module).graph.nodes)
    with torch.no_grad():
        graph.module.get_submodule(sites[0]).zero_point.fill_(3)
    assert len(drop_redundant_relus(graph.module).graph.nodes) == before + 1


def test_an_input_with_other_readers_keeps_its_relu():
    graph, _ = prepared("plain")
    nodes = graph.module.graph
    relu = next(n for n in nodes.nodes if str(n.target) == "features.2")
    source = relu.all_input_nodes[0]
    output = next(n for n in nodes.nodes if n.op == "output")
    output.args = ((output.args[0], source),)
    before = len(drop_redundant_relus(prepared("plain")[0].module).graph.nodes)
    assert len(drop_redundant_relus(graph.module).graph.nodes) == before + 1
