"""Rescaling keeps the function, wins where ranges are bad, and leaves alone what it must."""

from __future__ import annotations

import pytest
import torch
from nets import NETS, build, conv_bn, images
from torch import Tensor, nn

from mpq.errors import UsageError
from mpq.graph.passes import prepare, to_float
from mpq.policy import Policy
from mpq.ptq import equalize, quantize_graph
from mpq.ptq.pairs import links


class Inverted(nn.Module):
    """Two inverted residuals without shortcut, as in MobileNetV2."""

    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = [*conv_bn(3, 8), act()]
        for _ in range(2):
            layers += [*conv_bn(8, 24, 1), act(), *conv_bn(24, 24, groups=24), act()]
            layers += conv_bn(24, 8, 1)
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def inverted(act: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = Inverted(act)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.05, 0.2)
            nn.init.normal_(module.bias, 0, 0.1)
    return net.eval()


def skew(net: nn.Module, first: str, second: str, factor: Tensor) -> None:
    """Scale channels between a batch norm and the conv after it: the same function, bad ranges."""
    norm, conv = net.get_submodule(first), net.get_submodule(second)
    with torch.no_grad():
        norm.weight.mul_(factor)  # type: ignore[operator,union-attr]
        norm.bias.mul_(factor)  # type: ignore[operator,union-attr]
        if conv.groups == 1:
            conv.weight.div_(factor[None, :, None, None])  # type: ignore[operator,union-attr]
        else:
            conv.weight.div_(factor[:, None, None, None])  # type: ignore[operator,union-attr]


@torch.no_grad()
def error(net: nn.Module, batch: Tensor, mode: str, bits: tuple[int, int] = (8, 8)) -> float:
    graph, policy = to_float(net, batch), Policy.uniform(*bits)
    wanted = graph.module(batch)
    equalize(graph, batch, policy, mode=mode)  # type: ignore[arg-type]
    quantized = quantize_graph(prepare(graph, policy), batch, effort="fast")
    return float((quantized.module(batch) - wanted).square().mean() / wanted.var())


@pytest.mark.parametrize("name", NETS)
def test_the_function_stays_the_same(name: str) -> None:
    batch = images(16, seed=1)
    graph = to_float(build(name), batch)
    wanted = graph.module(batch)
    equalize(graph, batch, Policy.uniform(4, 4), mode="on")
    assert torch.allclose(graph.module(batch), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("act", [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.ReLU6])
def test_bad_ranges_are_mended(act: type[nn.Module]) -> None:
    """Channels that differ by three orders of magnitude, where 8 bits cannot hold them all."""
    batch = images(32, seed=2)
    net = inverted(act)
    even = error(net, batch, "off")
    factor = torch.logspace(-2, 1, 8)[torch.randperm(8)]
    wanted = net(batch)
    skew(net, "features.10", "features.11", factor)  # a linear bottleneck: no ReLU6 in between
    if act is not nn.ReLU6:
        factor = torch.logspace(-2, 1, 24)[torch.randperm(24)]
        skew(net, "features.4", "features.6", factor)
    assert torch.allclose(net(batch), wanted, rtol=1e-3, atol=1e-4)
    bad, mended = error(net, batch, "off"), error(net, batch, "auto")
    assert bad > 5 * even
    assert mended < 1.5 * even


@pytest.mark.parametrize("slope", [-0.01, 0.0005])
def test_a_prelu_that_hides_large_values_below_zero_hides_no_range(slope: float) -> None:
    """What it reads is stored as well, and a channel of it may be wide where little comes out."""
    torch.manual_seed(0)
    act = nn.PReLU(8)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), act, nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        act.weight[::2] = slope
        net[0].bias[::2] = -8.0  # type: ignore[index,union-attr]
    batch = torch.rand(16, 3, 12, 12)
    assert error(net, batch, "on") < 1.1 * error(net, batch, "off")


def test_even_ranges_are_left_alone() -> None:
    batch = images(32)
    graph = to_float(build("residual"), batch)
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    pairs = equalize(graph, batch, Policy.uniform(8))
    assert pairs
    assert all(p.reason == "its ranges are even enough" for p in pairs)
    assert all(torch.equal(v, before[k]) for k, v in graph.module.state_dict().items())


def test_relu6_is_refused_where_a_channel_may_saturate() -> None:
    """After a linear bottleneck nothing bounds what the layer before the ReLU6 gives."""
    graph = to_float(inverted(nn.ReLU6), images(16))
    reasons = {(p.first, p.second): p.reason for p in links(graph)}
    assert reasons["features.11", "features.14"] == "every channel may reach the 6 of its ReLU6"
    assert reasons["features.9", "features.11"] == ""


def test_a_bounded_channel_under_relu6_may_grow_to_the_ceiling_and_no_further() -> None:
    batch = 30 * images(16)  # inputs at which everything that can saturate does
    net = build("depthwise")
    with torch.no_grad():
        norm = net.depthwise[1]  # type: ignore[index,union-attr]
        norm.weight[:8] *= 1e-3
        norm.bias[:8] = 0.01
    graph = to_float(net, batch)
    limit = {p.first: p.limit for p in links(graph)}["depthwise.0"]
    assert bool((limit[:8] > 1).all())
    wanted = graph.module(batch)
    found = equalize(graph, batch, Policy.uniform(4, 8), mode="on")
    assert any(p.first == "depthwise.0" and not p.reason for p in found)
    assert torch.allclose(graph.module(batch), wanted, rtol=1e-3, atol=1e-3)


def test_a_layer_that_is_called_twice_is_refused() -> None:
    graph = to_float(build("shared"), images(2))
    assert [p.reason for p in links(graph)][:2] == ["a layer is called twice"] * 2


def test_dead_channels_stay_as_they_are() -> None:
    batch = images(16)
    net = inverted(nn.ReLU)
    with torch.no_grad():
        net.get_submodule("features.4").weight[:3] = 0  # type: ignore[index,union-attr]
        net.get_submodule("features.4").bias[:3] = -1  # type: ignore[index,union-attr]
    graph = to_float(net, batch)
    wanted = graph.module(batch)
    before = graph.module.get_submodule("features.3").bias[:3].clone()  # type: ignore[index,union-attr]
    equalize(graph, batch, Policy.uniform(4, 4), mode="on")
    assert torch.equal(graph.module.get_submodule("features.3").bias[:3], before)  # type: ignore[index,union-attr]
    assert bool(graph.module(batch).isfinite().all())
    assert torch.allclose(graph.module(batch), wanted, rtol=1e-3, atol=1e-4)


def test_an_unknown_mode_is_refused() -> None:
    graph = to_float(build("plain"), images(2))
    with pytest.raises(UsageError, match="equalize must be one of auto, on, off"):
        equalize(graph, images(2), Policy.uniform(8), mode="maybe")  # type: ignore[arg-type]
