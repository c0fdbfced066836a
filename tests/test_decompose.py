"""Decomposing operator by operator gives the files that decomposing the whole program gives."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mpq import to_float
from mpq.export import lower as lowering
from mpq.export.onnx_file import serialize


class Parts(nn.Module):
    """Pools, flattens, splits: operators that are composed of others, one with two results."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.conv(x).chunk(2, 1)
        pooled = nn.functional.adaptive_avg_pool2d(one * two.sigmoid(), 1)
        return torch.flatten(self.head(torch.flatten(pooled, 1)).unsqueeze(1), 1)


@pytest.fixture
def long_way(monkeypatch: pytest.MonkeyPatch) -> list[ExportedProgram]:
    """The programs that torch decomposed as a whole."""
    programs: list[ExportedProgram] = []
    whole = ExportedProgram.run_decompositions

    def noted(program: ExportedProgram, *args: object) -> ExportedProgram:
        programs.append(program)
        return whole(program, *args)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", noted)
    return programs


def test_the_file_is_the_same(
    monkeypatch: pytest.MonkeyPatch, long_way: list[ExportedProgram]
) -> None:
    torch.manual_seed(0)
    graph = to_float(Parts().eval(), torch.rand(2, 3, 8, 8))
    local = serialize(lowering.lower(graph))
    assert not long_way
    monkeypatch.setattr(lowering, "locally", contextlib.nullcontext)
    assert serialize(lowering.lower(graph)) == local
    assert long_way


def test_what_overwrites_goes_the_long_way(long_way: list[ExportedProgram]) -> None:
    class Overwrites(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.clone().add_(1)

    program = torch.export.export(Overwrites(), (torch.rand(2, 3),))
    with lowering.locally():
        found = program.run_decompositions({})
    assert len(long_way) == 1
    assert not any("add_" in str(node.target) for node in found.graph.nodes)
