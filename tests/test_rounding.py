"""Networks that amplify rounding are taken; graphs that differ are not, however little."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from mpq import to_float
from mpq.capture.rounding import in_float64, wide, widened
from mpq.errors import GraphError
from mpq.graph import passes
from mpq.graph.ir import QuantGraph


class Chaotic(nn.Module):
    """A folded norm, and steps of the logistic map, each of which about doubles a difference."""

    def __init__(self, steps: int, *, by_name: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc, self.steps, self.by_name = nn.Linear(8, 4), steps, by_name
        self.offsets = torch.zeros(8, 1, 1)  # neither parameter nor buffer

    def forward(self, x: Tensor) -> Tensor:
        y = (self.norm(self.conv(x)) + self.offsets).sigmoid()
        if self.by_name:
            y = y.float() * torch.ones(8, 1, 1, dtype=torch.float32)
        for _ in range(self.steps):
            y = 3.9 * y * (1 - y)
        return self.fc(y.mean((2, 3)))


def images() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(steps: int, *, by_name: bool = False) -> Chaotic:
    torch.manual_seed(0)
    made = Chaotic(steps, by_name=by_name)
    nn.init.uniform_(made.norm.running_var, 0.5, 2)
    nn.init.normal_(made.norm.running_mean)
    return made.eval()


@pytest.mark.parametrize("by_name", [False, True], ids=["", "float32 by name"])
def test_a_network_that_amplifies_rounding_is_taken(caplog, by_name):
    with caplog.at_level(logging.WARNING, "mpq"):
        graph = to_float(network(24, by_name=by_name), images())
    assert "amplifies the rounding of float32" in caplog.text
    assert list(graph.layers) == ["conv", "fc"]
    assert graph.layers["conv"].bias
    assert all(p.dtype == torch.float32 for p in graph.module.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_one_that_does_not_is_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "mpq"):
        to_float(network(1), images())
    assert not caplog.text


def off(path: str, by: float):
    """A pass that makes an error in one bias."""

    def worse(qg: QuantGraph) -> int:
        bias = qg.module.get_parameter(path)
        bias.data += by
        return 1

    return worse


@pytest.mark.parametrize("steps", [1, 24])
@pytest.mark.parametrize("path", ["conv.bias", "fc.bias"])
def test_a_graph_that_differs_is_refused_also_of_a_network_that_amplifies(monkeypatch, steps, path):
    by = 0.02
    rewrites = (*passes.REWRITES, off(path, by))
    monkeypatch.setattr(passes, "REWRITES", rewrites)
    monkeypatch.setattr(passes, "TO_FLOAT", (*rewrites, *passes.TO_FLOAT[2:]))
    with pytest.raises(GraphError, match="must answer as the model does, but on noise"):
        to_float(network(steps), images())


def test_a_graph_whose_float32_weights_are_others_is_refused(monkeypatch):
    """In float64 the passes are right; what they made in float32 is not."""
    late = off("fc.bias", 0.02)
    monkeypatch.setattr(passes, "TO_FLOAT", (*passes.REWRITES, late, *passes.TO_FLOAT[2:]))
    with pytest.raises(GraphError, match="must answer as the model does, but on noise"):
        to_float(network(24), images())


def test_float32_becomes_float64_wherever_it_is_asked_for():
    made = widened(network(2, by_name=True))
    assert made.offsets.dtype == torch.float64
    with in_float64():
        assert torch.zeros(2).dtype == torch.float64
        assert torch.zeros(2, dtype=torch.float32).dtype == torch.float64
        assert torch.zeros(2).to(torch.float32).float().dtype == torch.float64
        assert torch.zeros(2, dtype=torch.int64).dtype == torch.int64
        assert made(wide(images())).dtype == torch.float64
