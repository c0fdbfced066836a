from __future__ import annotations

import torch
from torch import Tensor, nn

from mpq.analyze import cost
from mpq.graph.liveness import live_sets
from mpq.graph.passes import to_float


class Block(nn.Module):
    """A residual block between a stem and a head, 8x8 images of 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.a, self.b = nn.Conv2d(4, 16, 1), nn.Conv2d(16, 4, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x + self.b(torch.relu(self.a(x)))
        return self.head(self.pool(x).flatten(1))


def test_the_peak_of_a_residual_block() -> None:
    graph = to_float(Block().eval(), torch.zeros(2, 3, 8, 8))
    found = live_sets(graph)
    # While `a` writes 16 maps, its own input is alive; while `b` writes, that input waits for the
    # addition: 4 maps read by `a`, 16 read by `b`, 4 that only the addition reads, at 8 bits.
    at_8 = dict.fromkeys(graph.layers, (8, 8))
    assert cost.activation_bytes(found, at_8) == (4 + 16 + 4) * 64
    assert cost.activation_bytes(found, at_8 | {"b": (8, 4)}) == (4 + 8 + 4) * 64
    assert cost.activation_bytes(found, at_8 | {"a": (8, 4)}) == (2 + 16 + 4) * 64
    assert cost.activation_bytes(found, at_8 | {"b": (None, None)}) == (4 + 64 + 4) * 64


def test_moments_hold_no_other_and_leave_the_graph_alone() -> None:
    graph = to_float(Block().eval(), torch.zeros(2, 3, 8, 8))
    found = live_sets(graph)
    assert not any(a is not b and a.within(b) for a in found for b in found)
    assert not graph.sites
    assert graph.stage == "float"
