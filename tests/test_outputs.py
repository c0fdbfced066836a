from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.errors import UsageError
from mpq.graph.outputs import as_places
from mpq.numerics import sqnr_db
from mpq.outputs import (
    Evidence,
    Output,
    Tally,
    compare,
    direction,
    divergence,
    propose,
    settle,
    spread_of,
)
from mpq.policy import OutputKind

SHAPES: dict[OutputKind, tuple[int, ...]] = {
    "classes": (6, 5),
    "places": (6, 4, 3, 2),
    "sequence": (6, 7, 4),
    "regression": (6, 3, 2),
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- comparing ---------------------------------------------------------------------------------


def test_classes_agree_by_the_largest() -> None:
    want = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    have = torch.tensor([[1.0, 2.5], [0.5, 1.0], [0.0, 1.0], [0.0, 2.0]])
    found = compare("classes", want, have)
    assert (found.n, found.agreement, found.largest) == (4, 0.75, 2.5)
    assert found.sqnr_db == sqnr_db(want, have)
    planes = compare("classes", want[..., None, None], have[..., None, None])
    assert planes == found


def test_a_tie_is_as_right_as_the_best_class() -> None:
    want = torch.tensor([[2.0, 2.0, 1.9], [1.0, 0.0, 0.0]])[None].transpose(1, 2)  # two places
    for chosen, equal in ((0, 1.0), (1, 1.0), (2, 0.5)):
        have = F.one_hot(torch.tensor([[chosen, 0]]), 3).transpose(1, 2).float()
        tally = Tally("places", step=0.04)  # 0.1 is more than two steps
        tally.add(want, have)
        assert tally.result().agreement == equal
    assert compare("places", want, want.flip(1)).agreement == 0.0  # no step, no tie


def test_places_are_counted_pixel_by_pixel() -> None:
    want = noise(2, 3, 4, 5)
    have = want.clone()
    have[0, :, 1, 2] = torch.tensor([0.0, 0.0, 99.0])
    want[0, 2, 1, 2] = -99.0
    found = compare("places", want, have)
    assert found.n == 2 * 4 * 5
    assert found.agreement == pytest.approx(1 - 1 / 40)
    assert compare("places", want, want).sqnr_db == math.inf


def test_a_flipped_class_map_disagrees() -> None:
    want = torch.zeros(1, 2, 8, 8)
    want[:, 1, :, :4] = 5.0  # the left half is of class 1
    assert compare("places", want, want.flip(3)).agreement == 0.0
    assert compare("places", want, want.flip(1)).agreement == 0.5  # the right half is a tie
    assert compare("places", want.float(), want.transpose(2, 3)).agreement == 0.5


def test_a_sequence_chooses_along_its_last_dimension() -> None:
    want = noise(2, 6, 4)
    later = want.roll(1, dims=1)  # one step late
    assert compare("sequence", want, want).agreement == 1.0
    found = compare("sequence", want, later)
    assert found.n == 12
    expected = (want.argmax(-1) == later.argmax(-1)).double().mean()
    assert found.agreement == pytest.approx(float(expected))


def test_quantities_are_compared_in_decibels() -> None:
    want = torch.tensor([[3.0, 4.0]])
    found = compare("regression", want, want * 1.1)
    assert found.agreement is None
    assert found.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert found.largest == pytest.approx(0.4, abs=1e-6)


def test_exact_is_equal_or_not() -> None:
    want = torch.tensor([3, 1, 4, 1])
    assert compare("exact", want, want).agreement == 1.0
    assert compare("exact", want, want + 1).agreement == 0.0
    assert compare("exact", want, torch.tensor([3, 1, 4, 2])).agreement == 0.75
    assert (
        compare("exact", torch.tensor([True, False]), torch.tensor([True, True])).agreement == 0.5
    )
    assert compare("exact", want, want).sqnr_db is None


def test_infinities_that_agree_are_no_noise_and_a_nan_is() -> None:
    want = torch.tensor([[1.0, -math.inf]])
    assert compare("regression", want, want).sqnr_db == math.inf
    assert compare("regression", want, want * 1.1).sqnr_db == pytest.approx(20.0, abs=1e-4)
    broken = compare("regression", want, torch.tensor([[1.0, math.nan]])).sqnr_db
    assert broken is not None
    assert not broken >= 15.0


def test_what_comes_in_batches_is_compared_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    want, have = noise(9, 3, 4), noise(9, 3, 4, seed=1)
    whole = compare("places", want, have)
    monkeypatch.setattr(Tally, "HELD", 20)
    tally = Tally("places")
    for part in range(0, 9, 2):
        tally.add(want[part : part + 2], have[part : part + 2])
    found = tally.result()
    assert (found.n, found.agreement, found.largest) == (whole.n, whole.agreement, whole.largest)
    assert found.sqnr_db == pytest.approx(whole.sqnr_db)


# -- costs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_the_direction_measures_the_divergence_of_a_small_change(kind: OutputKind) -> None:
    shape, draws = SHAPES[kind], 20_000
    answer = 2 * noise(*shape)
    change = 0.02 * noise(*shape, seed=1)
    spread = spread_of(answer)
    truth = divergence(kind, answer.double(), (answer + change).double(), spread)
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros(len(answer))
    for _ in range(draws // 200):
        # 200 draws at once, as if they were images
        many = answer.repeat(200, *[1] * (answer.ndim - 1))
        signs = torch.randint(0, 2, many.shape, generator=generator).float() * 2 - 1
        v = direction(kind, many, signs, spread=spread)
        u = (v.reshape(200, *shape) * change).reshape(200, len(answer), -1).sum(2)
        total += u.square().sum(0) / 2
    assert (total / draws / truth).tolist() == pytest.approx([1.0] * len(answer), rel=0.05)


def test_the_size_of_an_output_does_not_weigh() -> None:
    """A map of a hundred pixels costs what one of its pixels does; metres cost what miles do."""
    pixel, other = noise(4, 3), noise(4, 3, seed=1)
    tiled = [x[..., None, None].expand(-1, -1, 10, 10) for x in (pixel, other)]
    assert torch.allclose(divergence("places", *tiled), divergence("classes", pixel, other))
    spread = spread_of(pixel)
    near = divergence("regression", pixel, other, spread)
    far = divergence("regression", 1609 * pixel, 1609 * other, spread_of(1609 * pixel))
    assert torch.allclose(near, far)


def test_a_lost_quantity_costs_about_a_nat() -> None:
    answer = noise(200, 4)
    lost = divergence("regression", answer, answer[torch.randperm(200)], spread_of(answer))
    assert float(lost.mean()) == pytest.approx(1.0, rel=0.2)


def test_exact_costs_the_share_that_changed_and_ignored_nothing() -> None:
    want, have = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[1, 2], [4, 4]])
    assert divergence("exact", want, have).tolist() == [0.0, 0.5]
    assert divergence("ignored", want, have).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("values", [[[2.0]], [[0.0]]])
def test_a_spread_is_never_zero(values: list[list[float]]) -> None:
    assert spread_of(torch.tensor(values)) > 0


# -- proposals ---------------------------------------------------------------------------------


def seen(*shape: int, layer: str = "", **more: object) -> Evidence:
    return Evidence((1, *shape), layers=(layer,) if layer else (), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "evidence", "alone", "kind"),
    [
        ("output", seen(10, layer="fc"), True, "classes"),
        ("output", seen(4, layer="fc"), True, "classes"),  # of four classes, as far as one knows
        ("output", seen(1000, 1, 1, layer="features.12", convolved=True), True, "classes"),
        ("output", seen(1, layer="fc"), True, "regression"),
        ("output", seen(512, operations=frozenset({"normalize"})), True, "regression"),
        ("output", seen(4, layer="head.bbox_pred"), True, "regression"),
        ("embedding", seen(512, layer="fc"), True, "regression"),
        ("pooler_output", seen(512, layer="fc"), True, "regression"),
        ("output", seen(10, operations=frozenset({"sigmoid"})), True, "regression"),
        # One of several: [N, 4] may be boxes, [N, 512] an embedding.
        ("output.0", seen(4, layer="fc2"), False, "regression"),
        ("output.0", seen(512, layer="dense"), False, "regression"),
        ("output.0", seen(10, layer="classifier.3"), False, "classes"),
        ("class_logits", seen(91, layer="dense"), False, "classes"),
        ("clsLogits", seen(91, layer="dense"), False, "classes"),
        ("output.1", seen(2, 12, 12, softmax=1, convolved=True), False, "places"),
        # Maps: segmenters say so, pictures and the maps of detectors do not.
        ("out", seen(21, 8, 8, layer="classifier.4", convolved=True), False, "places"),
        ("output", seen(21, 8, 8, layer="segmentation_head.0", convolved=True), True, "places"),
        ("output", seen(21, 8, 8, layer="head.conv", convolved=True), True, "regression"),
        ("output.0", seen(255, 8, 8, layer="model.24.m.0", convolved=True), False, "regression"),
        ("output", seen(3, 32, 32, layer="upsampler.conv", convolved=True), True, "regression"),
        ("output", seen(1, 8, 8, layer="segmentation_head.0", convolved=True), True, "regression"),
        # Steps.
        ("logits", seen(100, 92, layer="class_labels_classifier"), False, "sequence"),
        ("pred_boxes", seen(100, 4, layer="bbox_predictor.layers.2"), False, "regression"),
        ("output", seen(26, 37, layer="fc", softmax=-1), True, "sequence"),
        ("logits", seen(5, 100, layer="conv", convolved=True), True, "places"),
        ("cls_logits", seen(900, 91, convolved=True, operations=frozenset({"permute"})), False,
         "sequence"),
        ("last_hidden_state", seen(197, 768, layer="classifier"), True, "regression"),
        # Whole numbers.
        ("labels", Evidence((1, 100), floating=False), False, "exact"),
        ("scores", Evidence((1, 100)), False, "regression"),
        ("output", Evidence(()), True, "regression"),
    ],
)  # fmt: skip
def test_kinds_are_proposed(name: str, evidence: Evidence, alone: bool, kind: str) -> None:
    found = propose(name, evidence, alone=alone)
    assert found.kind == kind
    assert found.rule


def outputs() -> dict[str, Output]:
    shapes = {"boxes": seen(4), "map": seen(21, 8, 8), "index": Evidence((1, 9), floating=False)}
    return {n: propose(n, e, alone=False) for n, e in shapes.items()}


def test_kinds_can_be_given() -> None:
    found = settle(outputs(), {"boxes": "classes", "map": "places", "index": "ignored"})
    assert [o.kind for o in found.values()] == ["classes", "places", "ignored"]
    assert found["map"].rule == "given"
    assert settle(outputs(), {}) == outputs()
    assert settle(outputs(), {"map": "sequence"})["map"].kind == "sequence"


def test_a_metric_of_places_makes_the_only_output_places() -> None:
    raw = propose("output", Evidence((1, 4, 8, 8), convolved=True), alone=True)
    assert raw.kind == "regression"
    assert as_places({"output": raw})["output"].kind == "places"
    given = settle({"output": raw}, {"output": "regression"})
    assert as_places(given) == given
    assert as_places(outputs()) == outputs()
    binary = {"output": propose("output", Evidence((1, 1, 8, 8), convolved=True), alone=True)}
    assert as_places(binary) == binary


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"boxs": "regression"},
            r"answers with boxes, map, index\. Got output 'boxs'; did you mean",
        ),
        ({"boxes": "regresion"}, "kind of output boxes must be one of .*did you mean regression"),
        ({"boxes": "places"}, r"needs logits \[N, K, \.\.\.\].*Got floats .*Try .*boxes=classes"),
        ({"map": "classes"}, r"output map cannot be of kind classes.*Try --output map=places"),
        ({"index": "classes"}, "Got whole numbers.*Try --output index=exact"),
    ],
)
def test_kinds_that_cannot_be_are_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        settle(outputs(), given)
