"""Every stored byte and every multiply-accumulate is in a layer or among what is besides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq
from mpq.analyze import Sensitivity, cost
from mpq.errors import InfeasibleError
from mpq.export import ExportResult, to_onnx
from mpq.export.certify import certify
from mpq.policy import Constraints, Policy
from mpq.targets import ONNXRUNTIME_CPU

MADE_FROM = 750
"""Bytes of what a file says of the checkpoint that it was made from, which these files do not."""


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.read = kind(8 * 8, 24, batch_first=True, bidirectional=True)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.read(F.relu(self.conv(x)).permute(0, 3, 1, 2).flatten(2))
        return self.head(y[:, -1])


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 16, 16))
        self.kind = nn.Embedding(3, 16)
        self.norm = nn.LayerNorm(16)
        self.qkv, self.head = nn.Linear(16, 48), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).flatten(2).mT + self.place + self.kind(torch.tensor([1]))
        q, k, v = self.qkv(self.norm(y)).chunk(3, -1)
        return self.head((torch.softmax(q @ k.mT, -1) @ v).mean(1))


class Reflecting(nn.Sequential):
    def __init__(self, big: nn.Module) -> None:
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
        super().__init__(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), big, nn.ReLU(), *pool)


def graph_of(net: nn.Module, images: Tensor) -> mpq.QuantGraph:
    for weight in net.parameters():
        weight.data += 0.01 * torch.randn_like(weight)  # equal constants would be stored once
    return mpq.to_float(net.eval(), images[:2])


def exported(graph: mpq.QuantGraph, images: Tensor, folder: Path) -> ExportResult:
    prepared = mpq.quantize_graph(mpq.prepare(graph, Policy.uniform(8)), images, effort="fast")
    return to_onnx(prepared, folder / "model.onnx", images=images)


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(8, 3, 16, 16)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named_with_bytes_and_macs(
    kind: type[nn.RNNBase], images: Tensor, tmp_path: Path
) -> None:
    net = Recurrent(kind)
    graph = graph_of(net, images)
    (part,) = (p for p in graph.besides if p.kind == kind.__name__)
    weights = {n: p.numel() for n, p in net.read.named_parameters()}
    matrices = sum(count for name, count in weights.items() if "weight" in name)
    assert part.name == "read"
    assert part.bytes == 4 * sum(weights.values())
    assert part.macs == 8 * matrices  # 8 columns are the steps
    assert "recurrent" in part.reason
    made = exported(graph, images, tmp_path)
    layers = sum(layer.macs for layer in graph.layers.values())
    told = made.certificate
    assert told.integer_macs_fraction == pytest.approx(layers / (layers + part.macs))
    if kind is nn.RNN:  # torch writes it as a product a step, each a row of the layers
        for each in (told, certify(made.path)):
            assert sum(row.macs for row in each.layers if not row.integer) == part.macs
        assert replace(part, macs=0) in told.besides
        return
    assert sum(told.stored.values()) == made.bytes
    assert told.stored["besides"] >= part.bytes
    (row,) = told.besides
    assert (row.name, row.kind, row.bytes, row.macs) == (
        "read", kind.__name__, part.bytes, part.macs
    )  # fmt: skip
    assert [p.macs for p in certify(made.path).besides] == [part.macs]


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.step = nn.Conv2d(3, 8, 3, 2, 1), nn.LSTMCell(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x)).mean((2, 3))
        state = self.step(y)
        return self.head(self.step(y, state)[0])


def test_each_call_of_a_recurrent_cell_counts(images: Tensor) -> None:
    cells = [p for p in graph_of(Cell(), images).besides if p.kind == "LSTMCell"]
    assert [p.macs for p in cells] == 2 * [4 * 6 * (8 + 6)]
    assert sum(p.bytes for p in cells) == 4 * 4 * 6 * (8 + 6 + 2)
    assert all("recurrent" in p.reason for p in cells)


def test_tables_places_and_products_of_activations_are_named(
    images: Tensor, tmp_path: Path
) -> None:
    graph = graph_of(Attending(), images)
    parts = {p.name: p for p in graph.besides}
    assert parts["place"].bytes == 4 * 16 * 16
    assert parts["kind"].bytes == 4 * 3 * 16
    assert parts["norm"].bytes == 4 * 2 * 16
    products = [p.macs for p in parts.values() if p.kind == "matmul"]
    assert products == [16 * 16 * 16, 16 * 16 * 16]
    made = exported(graph, images, tmp_path).certificate
    total = sum(layer.macs for layer in graph.layers.values())
    assert made.integer_macs_fraction == pytest.approx(total / (total + sum(products)))
    assert certify(tmp_path / "model.onnx").integer_macs_fraction == made.integer_macs_fraction


class Placed(nn.Module):
    """Adds a bias by place that a small network computes from a table."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 4)
        self.first, self.last = nn.Linear(2, 8), nn.Linear(8, 16)
        self.register_buffer("table", torch.rand(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.last(self.first(self.table).relu()).t().reshape(1, 16, 4, 4)
        return self.head((self.body(x) + bias).relu().mean((2, 3)))


def test_layers_that_read_no_input_stay_in_float_with_the_reason(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 4, 4)
    graph = graph_of(Placed(), images)
    assert [n for n, info in graph.layers.items() if info.constant] == ["first", "last"]
    found = exported(graph, images, tmp_path).certificate
    for certificate in (found, certify(tmp_path / "model.onnx")):
        rows = {row.name: row for row in certificate.layers}
        assert [n for n, row in rows.items() if row.integer] == ["body", "head"]
        assert "reads no input of the network" in rows["first"].reason
        assert not certificate.broken()


BIG: dict[str, nn.Module] = {
    "reflect": nn.Conv2d(16, 64, 3, padding=1, padding_mode="reflect"),
    "circular": nn.Conv2d(16, 64, 3, padding=1, padding_mode="circular"),
    "weight norm": nn.utils.parametrizations.weight_norm(nn.Conv2d(16, 64, 3, padding=1)),
}


@pytest.mark.parametrize("what", BIG)
def test_padded_and_parametrized_convolutions_are_layers(
    what: str, images: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    graph = mpq.to_float(Reflecting(BIG[what]).eval(), images[:2])
    assert list(graph.layers) == ["0", "2", "6"]
    scores = mpq.score_layers(graph, images)
    with pytest.raises(InfeasibleError):
        mpq.allocate(scores, Constraints(max_size_mb=0.004))
    found = mpq.allocate(scores, Constraints(max_size_mb=0.009))
    prepared = mpq.prepare(graph, mpq.build_policy(found, scores))
    mpq.quantize_graph(prepared, images, effort="fast")
    made = to_onnx(prepared, tmp_path / "model.onnx", images=images)
    assert made.bytes <= 9000
    assert found.bytes == pytest.approx(made.bytes, abs=MADE_FROM)


@pytest.mark.parametrize("net", [Recurrent, Attending])
def test_bytes_are_predicted_whatever_is_besides(
    net: type[nn.Module], images: Tensor, tmp_path: Path
) -> None:
    graph = graph_of(net(), images)
    made = exported(graph, images, tmp_path)
    widths = dict.fromkeys(graph.layers, (8, 8))
    layers = graph.layers.values()
    predicted = cost.predicted_bytes(layers, widths, ONNXRUNTIME_CPU, graph.besides)
    assert predicted == pytest.approx(made.bytes, rel=0.01, abs=MADE_FROM)


def test_what_is_besides_counts_in_every_budget_and_is_kept(images: Tensor) -> None:
    graph = graph_of(Recurrent(), images)
    scores = mpq.score_layers(graph, images)
    assert scores.besides == graph.besides
    assert Sensitivity.from_json(scores.to_json()) == scores
    found = mpq.allocate(scores, Constraints(effective_bits=8))
    macs = sum(part.macs for part in graph.besides)
    assert found.bitops >= macs * 32 * 32
    assert found.bytes > sum(part.bytes for part in graph.besides)
    with pytest.raises(InfeasibleError):
        mpq.allocate(scores, Constraints(max_bops=macs * 1000 / 1e9))
