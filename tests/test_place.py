from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import Head
from torch import Tensor, nn

import mpq
from mpq.export import place, runtime, to_onnx


class Subsampled(nn.Module):
    """A convolution between two subsamplings: of both axes, and twice along one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))[:, :, 1::2, :-1:3]
        x = torch.relu(self.second(x))
        return self.head(x[:, :, 1:][:, :, :-1])


def exported(path: Path) -> tuple[list[onnx.NodeProto], np.ndarray]:
    torch.manual_seed(0)
    images, policy = torch.randn(8, 3, 26, 26), mpq.Policy.uniform(8)
    graph = mpq.quantize_graph(mpq.prepare(Subsampled().eval(), policy, images), images)
    to_onnx(graph, path, images=images)
    return list(onnx.load(path).graph.node), runtime.run(runtime.session(path), images.numpy())


def test_slices_along_different_axes_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes, answers = exported(tmp_path / "joined.onnx")
    monkeypatch.setattr(place, "_join_slices", lambda graph: 0)
    apart, same = exported(tmp_path / "apart.onnx")
    count = [sum(n.op_type == "Slice" for n in found) for found in (nodes, apart)]
    assert count == [3, 4]  # two along one axis stay two
    assert np.array_equal(answers, same)
