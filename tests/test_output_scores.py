"""Scores of networks that are more than a classifier: any outputs, any inputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq import Policy, prepare
from mpq.analyze import Scoring, score_layers
from mpq.analyze.perturb import perturb
from mpq.analyze.validate import Simulator
from mpq.data import Normalization
from mpq.data.dataset import ArraySplit, DataSet
from mpq.errors import GraphError, PolicyError, UsageError
from mpq.graph.passes import to_float
from mpq.pipeline.analyzing import Analyzing, find_policy
from mpq.pipeline.quantizing import run_ptq
from mpq.pipeline.subject import Subject
from mpq.policy import Constraints, ModelInfo


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


IMAGES = noise(40, 3, 8, 8, seed=1)


class TwoHeads(nn.Module):
    """Classes and boxes; `factor` is the unit of the boxes."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.classifier, self.boxes = nn.Linear(8, 5), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = F.relu(self.stem(x)).amax((2, 3))
        return {"logits": self.classifier(f), "boxes": self.factor * self.boxes(f)}


class Segmenter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.classifier = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.classifier(F.relu(self.stem(x))), scale_factor=2.0)


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.depth(F.relu(self.stem(x)))


class Reader(nn.Module):
    """Reads a line of text: a class for each column."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        steps = F.relu(self.stem(x)).mean(2).transpose(1, 2)
        return self.fc(steps).log_softmax(-1)


KINDS = {
    TwoHeads: {"logits": "classes", "boxes": "regression"},
    Segmenter: {"output": "places"},
    Regressor: {"output": "regression"},
    Reader: {"output": "sequence"},
}


def float_graph(net: nn.Module, **given: str) -> Any:
    return to_float(net.eval(), IMAGES[:2], given)


@pytest.mark.parametrize("make", KINDS)
def test_kinds_are_those_of_the_task(make: type[nn.Module]) -> None:
    graph = float_graph(make())
    assert {name: output.kind for name, output in graph.outputs.items()} == KINDS[make]
    policy = Policy.uniform(8)
    kept = prepare(graph, policy).policy
    assert kept is not None
    assert kept.outputs == KINDS[make]
    assert prepare(graph, Policy.from_yaml(kept.to_yaml())).policy == kept


def test_a_plain_classifier_needs_no_word() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    graph = float_graph(net)
    assert [output.kind for output in graph.outputs.values()] == ["classes"]
    kept = prepare(graph, Policy.uniform(8)).policy
    assert kept is not None
    assert "outputs" not in kept.to_yaml()
    given = prepare(float_graph(net, output="regression"), Policy.uniform(8)).policy
    assert given is not None
    assert given.outputs == {"output": "regression"}


@pytest.mark.parametrize("make", KINDS)
def test_the_cheap_score_is_near_what_a_change_really_costs(make: type[nn.Module]) -> None:
    """Sums of both over all layers at 5 bits, where the second order holds."""
    graph, how = float_graph(make()), {"bits": (5,), "act_bits": (8,)}
    cheap = score_layers(graph, IMAGES, how=Scoring(**how, seed=2))  # type: ignore[arg-type]
    true = score_layers(graph, IMAGES, how=Scoring(**how, metric="kl"))  # type: ignore[arg-type]
    for name in graph.layers:
        one, other = (s.score(name, "weight", 5) for s in (cheap, true))
        assert one > 0
        # Softmax at temperature 2 bounds the first within a factor of about 2, and 40 images vary.
        assert 0.3 < one / other < 3.0, name


@pytest.mark.parametrize("make", KINDS)
def test_one_layer_alone_costs_its_divergence(make: type[nn.Module]) -> None:
    graph = float_graph(make())
    true = score_layers(graph, IMAGES, how=Scoring(bits=(3,), metric="kl"))
    simulator = Simulator(
        perturb(graph, IMAGES, weight_bits=(3,), activation_bits=()), IMAGES, None, batch=16
    )
    widths = dict.fromkeys(graph.layers, (None, None))
    assert simulator.measure(widths)[0] == 0.0
    found = simulator.measure(widths | {"stem": (3, None)})[0]
    assert found == pytest.approx(true.score("stem", "weight", 3), rel=1e-4)


def test_units_do_not_weigh_and_no_head_drowns_the_other() -> None:
    net = TwoHeads()
    metres = score_layers(float_graph(net), IMAGES)
    net.factor = 1609.0
    miles = score_layers(float_graph(net), IMAGES)
    for one, other in zip(metres.rows, miles.rows, strict=True):
        assert one.score == pytest.approx(other.score, rel=1e-4)
    heads = [metres.score(n, "weight", 4) for n in ("classifier", "boxes")]
    assert max(heads) < 50 * min(heads)


def test_an_ignored_output_costs_nothing() -> None:
    graph = float_graph(TwoHeads(), boxes="ignored")
    scores = score_layers(graph, IMAGES)
    assert scores.score("boxes", "weight", 4) == 0.0 < scores.score("classifier", "weight", 4)
    assert scores.key != score_layers(float_graph(TwoHeads()), IMAGES).key


class Chooser(nn.Module):
    """Ends in its argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Segmenter()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).argmax(1)


class NoBoxes(TwoHeads):
    """As a detector that found nothing: its boxes are none, its logits as ever or not asked for."""

    def __init__(self, logits: bool) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = super().forward(x)
        none = {"boxes": found["boxes"][:0]}
        return {"logits": found["logits"], **none} if self.logits else none


def test_an_empty_output_pulls_nothing() -> None:
    scores = score_layers(to_float(NoBoxes(logits=True).eval(), IMAGES[:8]), IMAGES[:8])
    assert scores.score("stem", "weight", 4) > 0
    with pytest.raises(GraphError, match="not empty on these inputs"):
        score_layers(to_float(NoBoxes(logits=False).eval(), IMAGES[:8]), IMAGES[:8])


def test_an_argmax_is_measured_and_no_gradient_scores_it() -> None:
    graph = float_graph(Chooser())
    assert graph.outputs["output"].kind == "exact"
    with pytest.raises(GraphError, match=r"output: exact\. Score by --metric kl"):
        score_layers(graph, IMAGES)
    scores = score_layers(graph, IMAGES, how=Scoring(bits=(8, 2), metric="kl"))
    assert 0 < scores.score("net.classifier", "weight", 2) <= 1  # a share of the pixels


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, image: Tensor, depth: Tensor | None = None) -> tuple[Tensor, Tensor]:
        f = F.relu(self.one(image))
        f = f if depth is None else f + F.relu(self.two(depth))
        return self.fc(f.mean((2, 3))), f


@pytest.mark.parametrize("metric", ["fisher", "gradient", "kl", "sqnr"])
def test_several_inputs_are_scored(metric: str) -> None:
    inputs = {"image": IMAGES, "depth": noise(40, 1, 8, 8, seed=3)}
    graph = to_float(TwoInputs().eval(), {n: x[:2] for n, x in inputs.items()})
    assert [o.kind for o in graph.outputs.values()] == ["regression", "regression"]
    how = Scoring(metric=metric, batch=16)  # type: ignore[arg-type]
    scores = score_layers(graph, inputs, how=how)
    assert all(scores.score(n, "weight", 4) > 0 for n in ("one", "two", "fc"))


class Positions(nn.Module):
    """Adds a table of positions that a small network of its own computes: of no image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table = nn.Conv2d(3, 8, 8), nn.Linear(2, 8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("places", noise(3, 2, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).flatten(1) + self.table(self.places).sum(0))


def test_a_layer_that_reads_no_image_is_scored() -> None:
    # One direction for each of many batches: the square of the sum against the sum of squares.
    graph = to_float(Positions().eval(), IMAGES[:2])
    many = noise(2000, 3, 8, 8, seed=3)
    cheap = score_layers(graph, many, how=Scoring(bits=(4,), batch=8))
    true = score_layers(graph, IMAGES, how=Scoring(bits=(4,), metric="kl"))
    ratio = cheap.score("table", "weight", 4) / true.score("table", "weight", 4)
    assert 0.5 < ratio < 2


def test_a_layer_that_reads_whole_numbers_is_scored() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.fc = nn.Embedding(9, 8), nn.Linear(8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.table(ids).mean(1))

    ids = torch.randint(0, 9, (12, 5), generator=torch.Generator().manual_seed(0))
    scores = score_layers(to_float(Tokens().eval(), ids[:2]), ids)
    assert scores.score("fc", "weight", 4) > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bxes": "regression"}, r"answers with logits, boxes\. Got output 'bxes'; did you mean"),
        ({"boxes": "regresion"}, "must be one of classes, .*did you mean regression"),
        ({"boxes": "places"}, r"cannot be of kind places: .*--output boxes=classes"),
    ],
)
def test_outputs_and_kinds_that_there_are_not(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        float_graph(TwoHeads(), **given)


def test_a_policy_with_an_unknown_kind_is_refused() -> None:
    text = "version: 1\noutputs: {boxes: regresion}\n"
    with pytest.raises(PolicyError, match=r"outputs\.boxes.* must be one of .*did you mean regr"):
        Policy.from_yaml(text)


def test_a_segmenter_is_analyzed_and_quantized_from_pictures_without_labels() -> None:
    pictures = np.random.default_rng(0).integers(0, 255, (48, 8, 8, 3), np.uint8)
    split = ArraySplit(pictures, np.zeros(48, np.int64), (8, 8))
    data = DataSet("pictures", (), split, split, split, (8, 8))
    info, how = ModelInfo(arch="seg", classes=4, input=(3, 8, 8)), Normalization.parse("none")
    subject = Subject(Segmenter().eval(), info, data, "pictures", how)
    analyzing = Analyzing(samples=32, validate=3, rescore=True)
    found = find_policy(subject, Constraints(effective_bits=6.0), analyzing)
    assert found.validation is not None
    assert all(t.kl > 0 and t.top1 is None for t in found.validation.truths)
    policy = found.choices[0].policy
    assert policy.outputs == {"output": "places"}
    made = run_ptq(policy, subject)
    assert made.policy.outputs == policy.outputs
    assert made.metrics["validation_top1"] is None
