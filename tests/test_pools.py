"""Average pooling in ceil mode is rewritten to what runtimes compute, and answers the same."""

from __future__ import annotations

import itertools

import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq import Policy, prepare, quantize_graph, to_float
from mpq.export import to_onnx

CASES = [
    (size, kernel, stride, padding)
    for size, kernel, stride, padding in itertools.product((9, 10, 11), (2, 3), (1, 2, 3), (0, 1))
    if padding <= kernel // 2
]


@pytest.mark.parametrize("case", CASES, ids=str)
@torch.no_grad()
def test_ceil_mode_answers_the_same_without_counting(case: tuple[int, int, int, int]):
    size, *window = case
    x = torch.randn(2, 3, size, size + 1, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AvgPool2d(*window, ceil_mode=True)).eval()
    graph = to_float(model, x)
    pools = [m for m in graph.module.modules() if isinstance(m, nn.AvgPool2d)]
    assert [p.count_include_pad for p in pools] == [False]
    torch.testing.assert_close(graph.module(x), model(x), atol=1e-6, rtol=1e-5)


def by_function(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=2, padding=1, ceil_mode=True)


def of_one_dimension(x: Tensor) -> Tensor:
    return F.avg_pool1d(x.flatten(2), 2, ceil_mode=True)


class Net(nn.Module):
    def __init__(self, pool) -> None:
        super().__init__()
        self.conv, self.fc, self.pool = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 5), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(F.relu(self.conv(x))).flatten(2).mean(2))


@pytest.mark.parametrize("pool", [by_function, of_one_dimension, nn.AvgPool2d(2, ceil_mode=True)])
@torch.no_grad()
def test_a_runtime_answers_as_the_float_graph(pool, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 9, 9)
    model = Net(pool).eval()
    graph = prepare(to_float(model, x[:2]), Policy.uniform(8))
    quantize_graph(graph, x, effort="fast")
    made = to_onnx(graph, tmp_path / "model.onnx", images=x)
    assert made.verification.max_own_step <= 1
    found = ort.InferenceSession(tmp_path / "model.onnx").run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x), atol=0.05, rtol=0.05)


def test_other_pooling_stays():
    pools = [nn.AvgPool2d(2), nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False)]
    graph = to_float(nn.Sequential(nn.Conv2d(3, 4, 1), *pools).eval(), torch.randn(2, 3, 9, 9))
    assert [n.target for n in graph.module.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
