"""Padding that moves values, or puts what no maximum ever is, runs on integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq
from mpq.export import to_onnx
from mpq.graph.kinds import kind_of, moves
from mpq.policy import Policy

PADS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": lambda x: F.pad(x, (1, 1, 0, 1)),
    "zeros of a module": nn.ZeroPad2d(1),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "reflect of a module": nn.ReflectionPad2d(1),
    "replicate": nn.ReplicationPad2d(1),
    "circular": nn.CircularPad2d(1),
    "same maximum": lambda x: F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-torch.inf), 3, 2),
}


class Padded(nn.Module):
    def __init__(self, pad: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3)
        self.pad, self.head = pad, nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.last(self.pad(self.first(x))))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("min_runtime", [None, "1.18"])
@pytest.mark.parametrize("name", PADS)
def test_padding_runs_on_integers(name: str, min_runtime: str | None, tmp_path: Path) -> None:
    images = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    graph = mpq.prepare(Padded(PADS[name]).eval(), Policy.uniform(8), images[:2])
    mpq.quantize_graph(graph, images, effort="fast")
    made = to_onnx(graph, tmp_path / "model.onnx", images=images, min_runtime=min_runtime)
    assert made.certificate.integer_macs_fraction == 1
    assert made.certificate.boundaries == 1  # the network's input


def test_minus_infinity_that_reaches_more_than_a_maximum_is_no_move() -> None:
    class Both(Padded):
        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(self.first(x), (0, 1, 0, 1), value=-torch.inf)
            return self.head((F.max_pool2d(y, 3, 2) + y[..., :1, :1]).mean((2, 3)))

    images = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    module = mpq.to_float(Both(F.relu).eval(), images).module
    kinds = {n: kind_of(n, dict(module.named_modules())) for n in module.graph.nodes}
    (pad,) = (n for n in kinds if n.target is F.pad)
    assert not moves(pad, kinds)
