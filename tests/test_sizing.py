"""The size of a small file is measured: what it takes besides its tensors is most of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mpq
from mpq import Constraints, Policy, Search, zoo
from mpq.analyze.cost import Allocation
from mpq.errors import ExportError
from mpq.export import to_onnx
from mpq.graph.ir import QuantGraph
from mpq.pipeline import sizing
from mpq.pipeline.sizing import sized


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def searched(net: nn.Module, images: Tensor) -> tuple[QuantGraph, Search]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = net.eval()
    graph = mpq.to_float(net, images[:2])
    return graph, Search(mpq.score_layers(graph, images))


def test_a_file_of_a_kilobyte_is_predicted_within_a_percent(images: Tensor, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    graph, search = searched(net, images)

    def policy(found: Allocation) -> Policy:
        return mpq.build_policy(found, search.scores)

    real = sized(search, graph, policy)
    for bits in (8.0, 6.0, 4.0):
        found = real.allocate(Constraints(effective_bits=bits))
        prepared = mpq.prepare(graph, policy(found))
        mpq.quantize_graph(prepared, images, effort="fast")
        made = to_onnx(prepared, tmp_path / "model.onnx")
        assert found.bytes == pytest.approx(made.bytes, rel=0.01)
    again = sized(real, graph, policy)
    assert again.scores.besides == real.scores.besides  # nothing is left to correct


def test_a_large_network_is_not_lowered_for_it(
    images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, search = searched(nn.Sequential(nn.Flatten(), nn.Linear(192, 600)), images)
    monkeypatch.setattr(sizing, "file_bytes", lambda *_: pytest.fail("it was"))
    assert sized(search, graph, lambda found: Policy()) is search


class Uneven(nn.Module):
    """A pooling that ONNX has no operator for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(128, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.adaptive_max_pool2d(self.stem(x), 4).flatten(1))


class Doubled(nn.Module):
    """An operator that the runtime has not for these numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Linear(288, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.erf(self.stem(x).double()).float().flatten(1))


REFUSED = "torch.onnx cannot export the model: ONNX has no form of adaptive_max_pool2d as it"


def test_a_network_that_cannot_be_lowered_keeps_the_average_and_is_told(
    images: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    graph, search = searched(Uneven(), images)
    assert sized(search, graph, lambda found: Policy()) is search
    assert f"mpq export will refuse this network, and sizes are estimates: {REFUSED}" in caplog.text


def test_a_network_that_cannot_be_lowered_is_not_trained(images: Tensor) -> None:
    def loss(outputs: Tensor, batch: Tensor) -> Tensor:
        return pytest.fail("a step was taken")

    with pytest.raises(ExportError, match=REFUSED):
        mpq.qat(Uneven().eval(), [images, images], Policy.uniform(8), loss=loss, epochs=1)
    with pytest.raises(ExportError, match=r"onnxruntime .* can load.*Erf"):
        mpq.qat(Doubled().eval(), [images, images], Policy.uniform(8), loss=loss, epochs=1)


class Shared(nn.Module):
    """One convolution called twice, and once more without the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for _ in range(2):
            x = self.norm(self.again(nn.functional.pad(x, (1, 1, 1, 1)))).relu()
        return self.again(x).mean((2, 3))


def test_a_weight_that_layers_share_is_counted_for_each(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)  # the third sharer's width is the search's: it must round apart
    graph, search = searched(Shared(), images)
    assert list(graph.layers) == ["stem", "again", "again_2", "again_3"]
    first, second = (graph.module.get_parameter(f"{n}.weight") for n in ("again", "again_2"))
    assert torch.equal(first, second)
    search = sized(search, graph, lambda found: mpq.build_policy(found, search.scores))

    def written(*bits: int) -> tuple[int, int]:
        pairs = {name: (b, 8) for name, b in zip(("again", "again_2"), bits, strict=True)}
        chosen = replace(search, locked=pairs).allocate(Constraints())
        prepared = mpq.prepare(graph, mpq.build_policy(chosen, search.scores))
        mpq.quantize_graph(prepared, images, method="minmax", effort="fast")
        return chosen.bytes, to_onnx(prepared, tmp_path / "model.onnx").bytes

    for bits in ((8, 4), (4, 8)):
        predicted, found = written(*bits)
        assert predicted == pytest.approx(found, rel=0.01)
    predicted, found = written(8, 8)
    assert predicted - first.numel() - 200 < found < predicted  # rounded alike, it is stored once


@pytest.mark.parametrize("bits", [(8, 4), (8, 6, 5, 4), (16, 8)])
def test_no_file_is_larger_than_its_budget(bits: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, loader = zoo.build("resnet8", 10).eval(), [torch.rand(8, 3, 32, 32)]
    wide = mpq.analyze(model, loader, budget=float(bits[0]), bits=bits, num_calib=8)
    for point in wide.front[3::8]:
        budget = {"max_size_mb": point.bytes / 1e6}  # of a file that is predicted to have just that
        found = mpq.analyze(model, loader, budget=budget, bits=bits, num_calib=8)
        made = mpq.export(mpq.ptq(model, loader, found), tmp_path / "model.onnx", force=True)
        assert 0.8 * point.bytes < made.bytes <= point.bytes


def test_a_file_that_outgrows_the_budget_of_its_policy_says_so(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = Policy.uniform(4).replace(constraints=Constraints(max_size_mb=0.001))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    made = mpq.export(mpq.ptq(net, [images], policy), tmp_path / "model.onnx")
    assert f"the file has {made.bytes:,} bytes, more than the max_size_mb 0.001" in caplog.text
    policy = policy.replace(constraints=Constraints(max_size_mb=0.1))
    caplog.clear()
    mpq.export(mpq.ptq(net, [images], policy), tmp_path / "model.onnx", force=True)
    assert "max_size_mb" not in caplog.text
