from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from mpq.analyze import Scoring, score_layers
from mpq.analyze.perturb import perturb
from mpq.analyze.validate import Simulator, random_widths, spearman, validate
from mpq.checkpoint import weights_hash
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float


class Net(nn.Module):
    """Two layers that read one tensor, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = nn.ModuleDict({"a": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 8, 1)})
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.block["a"](x)) + self.block["b"](x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


@pytest.fixture
def images() -> Tensor:
    return torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def graph(images: Tensor) -> QuantGraph:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return to_float(Net().eval(), images[:2])


FLOAT = {"stem": (None, None), "block.a": (None, None), "block.b": (None, None)}


def test_one_layer_alone_costs_its_kl(graph: QuantGraph, images: Tensor) -> None:
    scores = score_layers(graph, images, how=Scoring(bits=(8, 3), act_bits=(4,), metric="kl"))
    simulator = Simulator(
        perturb(graph, images, weight_bits=(3,), activation_bits=(4,)), images, None
    )
    kl, loss, top1 = simulator.measure({**FLOAT, "head": (3, None)})
    assert kl == pytest.approx(scores.score("head", "weight", 3), rel=1e-4)
    assert (loss, top1) == (None, None)
    kl, _, _ = simulator.measure({**FLOAT, "head": (None, 4)})
    assert kl == pytest.approx(scores.score("head", "activation", 4), rel=1e-4)
    both = {**FLOAT, "block.a": (None, 4), "block.b": (None, 4), "head": (None, None)}
    shared = sum(scores.score(n, "activation", 4) for n in ("block.a", "block.b"))
    assert simulator.measure(both)[0] == pytest.approx(shared, rel=1e-4)
    assert simulator.measure({**FLOAT, "head": (None, None)})[0] == 0.0


def test_the_labels_are_measured_too(graph: QuantGraph, images: Tensor) -> None:
    labels = graph.module(images).argmax(1)
    simulator = Simulator(
        perturb(graph, images, weight_bits=(2,), activation_bits=(8,)), images, labels
    )
    _, loss, top1 = simulator.measure(dict.fromkeys(graph.layers, (2, None)))
    before = torch.nn.functional.cross_entropy(graph.module(images), labels)
    noise = perturb(graph, images, weight_bits=(2,), activation_bits=(8,))
    for name in graph.layers:
        noise.weight(name).add_(noise.weights[name, 2])
    logits = noise.graph.module(images)
    after = torch.nn.functional.cross_entropy(logits, labels)
    assert loss == pytest.approx(float((after - before).detach()), rel=1e-4)
    assert top1 == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))
    assert simulator.measure(dict.fromkeys(graph.layers, (None, None)))[2] == 100.0


def test_a_validation_ranks_random_policies(graph: QuantGraph, images: Tensor) -> None:
    before = weights_hash(graph.module.state_dict())
    scores = score_layers(graph, images[:24], how=Scoring(bits=(8, 4), act_bits=(8, 4)))
    pairs = [(8, 8), (4, 8), (8, 4), (4, 4)]
    seen: list[tuple[int, int]] = []
    noise = perturb(graph, images[:24], weight_bits=(8, 4), activation_bits=(8, 4))
    simulator, tell = Simulator(noise, images[24:], None), lambda *done: seen.append(done)
    found = validate(simulator, scores, pairs, count=20, progress=tell)
    assert len(found.truths) == 20
    assert seen[-1] == (20, 20)
    assert found.rho > 0.5
    told_of = [(t.predicted, t.kl) for t in found.truths]
    assert found.rho == pytest.approx(spearmanr(told_of)[0])
    told = found.to_json()
    assert told["rho"] == pytest.approx(found.rho)
    assert told["rho_loss"] is None
    assert told["policies"][0]["predicted"] == scores.predict(found.truths[0].widths)
    assert weights_hash(graph.module.state_dict()) == before


def test_random_policies_differ_and_respect_groups(graph: QuantGraph, images: Tensor) -> None:
    scores = score_layers(graph, images, how=Scoring(act_bits=(8, 4)))
    assert scores.groups == (("block.a", "block.b"),)
    drawn = random_widths(scores, [(8, 8), (4, 8), (8, 4), (4, 4)], count=40, seed=3)
    assert len({tuple(w.items()) for w in drawn}) == len(drawn) == 40
    assert all(w["block.a"][1] == w["block.b"][1] for w in drawn)
    few = random_widths(scores, [(8, 8), (4, 8)], count=40, seed=3)
    assert 10 < len(few) <= 16  # there are no more than 2^4


def test_rank_correlation_of_little() -> None:
    assert math.isnan(spearman([1, 2], [1, 2]))
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))
    assert spearman([1, 2, 3], [10, 20, 30]) == 1.0
