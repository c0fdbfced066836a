"""What transformers do beside their layers comes into the file: attention, tables, bounds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq import Policy, prepare, quantize_graph, to_float
from mpq.export import to_onnx
from mpq.graph.attention import scaled_dot_product_attention

MASKS = {
    "none": {},
    "bool": {"attn_mask": torch.rand(5, 6, generator=torch.Generator().manual_seed(1)) > 0.3},
    "float": {"attn_mask": torch.linspace(-2, 2, 30).view(5, 6)},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.2},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("before", [(2,), (2, 3), (2, 3, 4)], ids=len)
def test_answers_as_torch_does(mask: str, before: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(*before, *size) for size in ((5, 8), (6, 8), (6, 7)))
    wanted = F.scaled_dot_product_attention(q, k, v, **MASKS[mask])
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **MASKS[mask]), wanted)


class Windows(nn.Module):
    """Attention within four windows of a picture: two heads of five dimensions, or one of three."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.stem, self.qkv, self.heads = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 24), heads
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT  # [N, 16, 8]
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.heads:
            q, k, v = (t.unflatten(1, (4, 4)).unflatten(3, (2, 4)).transpose(2, 3)
                       for t in (q, k, v))  # fmt: skip
        x = F.scaled_dot_product_attention(q, k, v)
        if self.heads:
            x = x.transpose(2, 3).flatten(3).flatten(1, 2)
        return self.head(x.mean(1))


@pytest.mark.parametrize("heads", [0, 2])
def test_the_file_answers_as_the_simulation(heads: int, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 3, 16, 16)
    model = Windows(heads).eval()
    graph = to_float(model, x[:2])
    torch.testing.assert_close(graph.module(x), model(x))
    graph = quantize_graph(prepare(graph, Policy.uniform(8)), x, effort="fast")
    made = to_onnx(graph, tmp_path / "model.onnx", images=x)
    assert made.verification is not None
    assert made.verification.agreement == 1.0
    assert all(layer.integer for layer in made.certificate.layers)


class PositionBias(nn.Module):
    """Attention with a bias that is looked up by relative position, as in Swin."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.stem, self.head, self.form = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5), form
        self.table = nn.Parameter(torch.randn(31, 8))
        self.register_buffer("places", torch.randint(0, 31, (256,)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT  # [N, 16, 8]
        if self.form == "index":
            bias = self.table[self.places]
        else:
            bias = torch.index_select(self.table, 0, self.places)
        bias = bias.view(16, 16, 8).mean(2)
        return self.head((torch.softmax(x @ x.mT + bias, -1) @ x).mean(1))


@pytest.mark.parametrize("form", ["index", "select"])
def test_a_table_is_stored_and_not_the_rows_that_are_looked_up(form: str, tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.rand(8, 3, 16, 16)
    graph = to_float(PositionBias(form).eval(), x[:2])
    graph = quantize_graph(prepare(graph, Policy.uniform(8)), x, effort="fast")
    path = tmp_path / "model.onnx"
    made = to_onnx(graph, path, images=x)
    assert made.verification is not None
    assert made.verification.agreement == 1.0
    stored = {int(np.prod(t.dims)) for t in onnx.load(path).graph.initializer}
    assert 31 * 8 in stored
    assert 256 * 8 not in stored


class Bounds(nn.Module):
    """One tensor within three pairs of bounds that are buffers, as the inputs of Gemma's layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.heads = nn.ModuleList(nn.Linear(8, 5) for _ in range(3))
        for i in range(3):
            self.register_buffer(f"low_{i}", torch.tensor(-0.1 * (i + 1)))
            self.register_buffer(f"high_{i}", torch.tensor(0.1 * (i + 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).mean((2, 3)) * 2
        bounds = [(getattr(self, f"low_{i}"), getattr(self, f"high_{i}")) for i in range(3)]
        return sum(f(x.clamp(*pair)) for f, pair in zip(self.heads, bounds, strict=True))


def test_a_tensor_is_clamped_to_bounds_of_its_own_by_each_reader(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 16, 16)
    graph = to_float(Bounds().eval(), x[:2])
    graph = quantize_graph(prepare(graph, Policy.uniform(8)), x, effort="fast")
    made = to_onnx(graph, tmp_path / "model.onnx", images=x)
    assert made.verification is not None
    assert made.verification.agreement == 1.0
