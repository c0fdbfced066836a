"""Single graph passes on graphs of a few nodes: kinds, fold_bn, describe, insert."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from mpq.errors import GraphError
from mpq.export import runtime, to_onnx
from mpq.graph.annotate import annotate
from mpq.graph.describe import describe
from mpq.graph.fold_bn import fold_bn, scale_outputs
from mpq.graph.insert import insert
from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.passes import prepare
from mpq.policy import Policy
from mpq.ptq import calibrate
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.quant.operation import LayerOp


def traced(module: nn.Module, example: Tensor) -> QuantGraph:
    return QuantGraph(fx.symbolic_trace(module.eval()), example)


def norm_of(channels: int) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(channels)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            values.uniform_(0.5, 2.0)
    return norm.eval()


def test_kinds_of_modules_functions_and_methods():
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.tanh = nn.Conv2d(3, 3, 1), nn.ReLU6(), nn.Tanh()
            self.one, self.four = nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.tanh(self.act(self.conv(x)))
            y = F.relu(y) + self.four(y)
            return (self.one(y) * y).flatten(1)

    graph = fx.symbolic_trace(Mixed())
    modules = dict(graph.named_modules())
    assert [kind_of(n, modules) for n in graph.graph.nodes] == [
        "placeholder", "layer", "relu6", "other", "relu", "adaptive_avgpool", "add",
        "global_avgpool", "mul", "flatten", "output",
    ]  # fmt: skip


@torch.no_grad()
def test_random_slopes_are_their_mean_in_a_file(tmp_path: Path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.RReLU(0.1, 0.5), nn.Conv2d(4, 2, 1)).eval()
    graph = prepare(net, Policy.uniform(8, 8), x)
    calibrate(graph, x, method="minmax")
    path = to_onnx(graph, tmp_path / "m.onnx", images=x).path
    found = torch.from_numpy(runtime.run(runtime.session(path), x.numpy()))
    torch.testing.assert_close(found, net(x).flatten(1), atol=0.05, rtol=0.05)


@pytest.mark.parametrize(("attribute", "kind"), [("shape", "shape"), ("T", "other")])
def test_an_attribute_is_a_shape_only_where_it_is_one(attribute: str, kind: str):
    graph = fx.Graph()
    node = graph.call_function(getattr, (graph.placeholder("x"), attribute))
    assert kind_of(node, {}) == kind
    assert kind_of(graph.call_function(operator.getitem, (node, 0)), {}) == "slice"


def test_a_norm_is_folded_into_the_layer_that_it_alone_reads():
    x, conv, norm = torch.randn(2, 3, 4, 4), nn.Conv2d(3, 5, 1), norm_of(5)
    qg = traced(nn.Sequential(conv, norm, nn.ReLU()), x)
    expected, factor = qg.module(x), norm.weight / (norm.running_var + norm.eps).sqrt()
    assert fold_bn(qg) == 1
    torch.testing.assert_close(qg.module(x), expected)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in qg.module.modules())
    torch.testing.assert_close(qg.folded["0"], factor.detach())


def test_a_norm_without_a_layer_before_it_becomes_a_depthwise_convolution():
    x = torch.randn(2, 3, 4, 4)
    qg = traced(nn.Sequential(nn.ReLU(), norm_of(3)), x)
    expected = qg.module(x)
    assert fold_bn(qg) == 1
    torch.testing.assert_close(qg.module(x), expected)
    assert qg.module.get_submodule("1").groups == 3
    assert list(qg.folded) == ["1"]


def test_a_norm_of_the_batch_stays():
    qg = traced(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
                torch.randn(2, 3, 4, 4))  # fmt: skip
    assert fold_bn(qg) == 0
    assert qg.folded == {}


def test_outputs_of_a_transposed_convolution_in_groups_are_scaled_by_channel():
    layer, x = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), torch.randn(1, 4, 3, 3)
    factor = torch.arange(1.0, 7.0)
    expected = layer(x) * factor.reshape(1, -1, 1, 1)
    layer.weight = nn.Parameter(scale_outputs(layer.weight.detach(), factor, LayerOp.of(layer)))
    torch.testing.assert_close(layer(x), expected)


def test_layers_are_measured_in_order_of_execution():
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Flatten(), nn.Linear(8 * 4 * 4, 10),
    )  # fmt: skip
    qg = traced(net, torch.randn(2, 4, 8, 8))
    assert describe(qg) == 3
    assert [(i.name, i.kind) for i in qg.layers.values()] == [
        ("0", "conv"), ("1", "depthwise"), ("3", "linear")
    ]  # fmt: skip
    assert [i.macs for i in qg.layers.values()] == [8 * 4 * 9 * 16, 8 * 9 * 16, 128 * 10]
    assert (qg.layers["0"].in_elements, qg.layers["0"].out_elements) == (256, 128)
    assert qg.layers["0"].strided


def test_a_network_without_layers_is_refused():
    with pytest.raises(GraphError, match="no Conv or Linear layer"):
        describe(traced(nn.Sequential(nn.ReLU()), torch.randn(1, 3, 4, 4)))


def test_insertion_follows_the_annotation():
    x = torch.randn(2, 3, 6, 6)
    qg = traced(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6(), nn.Conv2d(4, 4, 1)), x)
    describe(qg)
    annotate(qg, policy=Policy.uniform(8))
    count = insert(qg)
    qg.module.recompile()
    quantizers = [m for m in qg.module.modules() if isinstance(m, FakeQuant)]
    layers = [m for m in qg.module.modules() if isinstance(m, QuantLayer)]
    assert count == len(quantizers) + len(layers) == len(qg.sites) + 2
    assert all(layer.source in quantizers for layer in layers)
    assert [q.ceiling for q in quantizers].count(6.0) == 1
    assert isinstance(qg.module.get_submodule("1"), nn.ReLU)  # the quantizer is its upper bound
    assert qg.module(x).shape == (2, 4, 4, 4)
