"""Functions on weights become the layers that they are, at the path of who owns the weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq import to_float
from mpq.graph.ir import QuantGraph


class Standardized(nn.Conv2d):
    """Weight standardization (Qiao et al., 2019), with a gain, as in NFNets."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.flatten(1)
        weight = (flat - flat.mean(1, keepdim=True)) / flat.std(1, keepdim=True)
        return self._conv_forward(x, weight.view_as(self.weight) * self.gain, self.bias)


class Same(nn.Conv2d):
    """Pads by the size of its input, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        pad = (0, (-w) % self.stride[1], 0, (-h) % self.stride[0])
        return F.conv2d(F.pad(x, pad), self.weight, self.bias, self.stride)


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one, as in timm."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                         False, 0.1, self.eps)  # fmt: skip
        return self.act(x)


class Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("kernel", torch.full((8, 1, 2, 2), 0.25))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel, stride=2, groups=8)


class Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4, 2, 2) / 4)
        self.shift = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, self.weight, self.shift, 2, groups=2)


def reflecting() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")


CASES = {
    "standardized": (lambda: Standardized(8, 8, 3, padding=1), ["0", "1"]),
    "same": (lambda: Same(8, 8, 3, stride=2), ["0", "1"]),
    "norm and activation": (lambda: NormAct(8), ["0"]),
    "blur": (Blur, ["0", "1_kernel"]),
    "transposed": (Up, ["0", "1_weight"]),
    "reflecting": (reflecting, ["0", "1"]),
}


def network(middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), middle, nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


@torch.no_grad()
def graph_of(model: nn.Module) -> QuantGraph:
    x = torch.randn(3, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    graph = to_float(model, x[:2])
    torch.testing.assert_close(graph.module(x), model(x), atol=1e-5, rtol=1e-4)
    return graph


@pytest.mark.parametrize(("middle", "layers"), CASES.values(), ids=CASES)
def test_functions_on_weights_are_layers(middle, layers):
    torch.manual_seed(0)
    part = middle()
    if isinstance(part, nn.BatchNorm2d):
        nn.init.uniform_(part.running_var, 0.5, 2)
    graph = graph_of(network(part))
    assert list(graph.layers) == layers
    assert not any("gain" in key or "running" in key for key in graph.module.state_dict())


def test_a_computed_weight_is_said(caplog: pytest.LogCaptureFixture):
    torch.manual_seed(0)
    with caplog.at_level("INFO", logger="mpq"):
        graph_of(network(Standardized(8, 8, 3)))
    assert "the weight of conv2d is computed: taken as what it comes to" in caplog.text


def test_the_activation_inside_a_norm_stays():
    torch.manual_seed(0)
    graph = graph_of(network(NormAct(8)))
    assert [str(n.target) for n in graph.module.graph.nodes if n.op == "call_module"][:2] == [
        "0",
        "1.act",
    ]


def test_statistics_of_a_norm_by_function_stay_when_shapes_are_asked():
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean((2, 3))  # a rewrite runs the example for its rank

    torch.manual_seed(0)
    norm = NormAct(8)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    graph_of(nn.Sequential(nn.Conv2d(3, 8, 3), norm, Mean()).eval())


def test_a_weight_that_others_read_leaves_its_module_in_place():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = F.linear(x.mean((2, 3)), self.own.weight, self.own.bias)
            return F.linear(y, self.own.weight.T) + self.own.weight.sum()

    torch.manual_seed(0)
    graph = graph_of(nn.Sequential(nn.Conv2d(3, 8, 3), Tied()).eval())
    assert list(graph.layers) == ["0", "1_own_weight", "1_own_weight_1"]


def test_a_weight_that_the_input_decides_is_no_layer():
    class Cross(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.flatten(2), x.flatten(2).mean(0))

    torch.manual_seed(0)
    graph = to_float(nn.Sequential(nn.Conv2d(3, 8, 3), Cross()).eval(), torch.randn(2, 3, 10, 10))
    assert list(graph.layers) == ["0"]
