"""`--loss own`: QAT by the training step that a network brings itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpq
from mpq.errors import UsageError
from mpq.graph.passes import prepare, to_float
from mpq.metrics.given import loss_of
from mpq.ptq import quantize_graph
from mpq.train.own import OwnStep

SETTINGS = {"batch": 16, "lr": 0.1, "crop": 0.0, "flip": False}


class Detector(nn.Module):
    """Answers as a detector of torchvision: maps, and losses for a batch in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head, self.scale = nn.Conv2d(8, 4, 1), nn.Parameter(torch.ones(1))

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        maps = self.head(self.body(images)) * self.scale
        if self.training and targets is not None:
            return {"classes": F.cross_entropy(maps, targets), "size": 0.01 * maps.square().mean()}
        return maps


class Pyramid(Detector):
    """As `Detector`, its head called at two scales, whose layers the graph keeps apart."""

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Any:
        seen = self.body(images)
        fine, coarse = self.head(seen), self.head(F.max_pool2d(seen, 2))
        maps = fine + F.interpolate(coarse, scale_factor=2.0)
        if self.training and targets is not None:
            return {"classes": F.cross_entropy(maps, targets)}
        return maps


class Lit(nn.Module):
    """Learns as a module of Lightning does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"loss": F.cross_entropy(self(batch[0]), batch[1])}


class Answering(Lit):
    """As `Lit`, with another answer of its step."""

    answer: Any = None

    def training_step(self, batch: Any) -> Any:
        return self.answer(self(batch[0]))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight)


def pictures(count: int = 32) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def batches() -> DataLoader[Any]:
    x = pictures()
    return DataLoader(TensorDataset(x, (4 * x.mean(1)).long().clamp(max=3)), batch_size=16)


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().eval()


def qat(network: nn.Module, **more: Any) -> mpq.Quantized:
    options: dict[str, Any] = {"loss": "own", "epochs": 4, "settings": SETTINGS} | more
    return mpq.qat(network, batches(), mpq.Policy.uniform(4, 8), **options)


@pytest.mark.parametrize("kind", [Detector, Pyramid, Lit])
@pytest.mark.parametrize("norm", ["live", "folded"])
def test_a_network_learns_by_its_own_step(kind, norm) -> None:
    network = made(kind)
    before = copy.deepcopy(network.state_dict())
    found = qat(network, settings=SETTINGS | {"norm": norm})
    assert (found.metrics["loss"], found.metrics["teachers"]) == ("own", [])
    started = qat(network, epochs=1, settings=SETTINGS | {"norm": norm, "lr": 1e-9})
    x, y = next(iter(batches()))
    with torch.no_grad():
        costs = [float(F.cross_entropy(q.module(x), y)) for q in (found, started)]
    assert costs[0] < 0.97 * costs[1]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(("kind", "learnt"), [(Detector, "scale"), (Pyramid, "head_2.weight")])
def test_the_step_runs_what_the_graph_runs(kind, learnt) -> None:
    network = made(kind)
    graph = prepare(to_float(network, pictures(2)), mpq.Policy.uniform(4, 8))
    quantize_graph(graph, pictures())
    step = OwnStep(network, graph)
    step.network.eval()
    graph.module.eval()
    answers = [network(pictures(4)) for network in (step.network, graph.module)]
    torch.testing.assert_close(*answers, atol=0.02, rtol=0)  # which rounds its output as well
    own = {id(p) for p in step.parameters() if p.requires_grad}
    assert own <= {id(p) for p in graph.module.parameters()}
    assert id(graph.module.get_parameter(learnt)) in own


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda y: None, r"must give a loss with a gradient.*Got NoneType"),
        (lambda y: y, r"must give a loss with a gradient.*Got float32 \[16, 4, 8, 8\]"),
        (lambda y: y.detach().mean(), r"must give a loss with a gradient.*Got float32 \[\]"),
        (lambda y: {"accuracy": 1.0}, r"must give a loss with a gradient.*\{accuracy: float\}"),
        (lambda y: y.nothing, r"step failed with AttributeError.*It was given .*float32 \[16, 3"),
    ],
)
def test_steps_that_teach_nothing(answer, message) -> None:
    network = made(Answering)
    network.answer = answer
    with pytest.raises(UsageError, match=message):
        qat(network, epochs=1)


def test_a_loss_in_an_object_is_found() -> None:
    network = made(Answering)
    network.answer = lambda y: SimpleNamespace(loss=y.square().mean(), logits=y)
    assert qat(network, epochs=1).metrics["loss"] == "own"


def test_what_the_own_step_cannot_do() -> None:
    with pytest.raises(UsageError, match=r"own is all that teaches.*--teacher"):
        qat(made(Lit), teacher=made(Lit))
    with pytest.raises(UsageError, match=r"layers that are modules .* is none"):
        qat(made(Functional))
    with pytest.raises(UsageError, match="--loss own goes with mpq qat"):
        mpq.analyze(made(Lit), batches(), loss="own")
    assert loss_of("own").__name__ == "own"
