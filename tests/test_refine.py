from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import spearmanr

from mpq.analyze import Allocation, Row, Sensitivity, allocate
from mpq.analyze.refine import MARGIN, Refined, Vector, refine
from mpq.layers import LayerInfo
from mpq.policy import Constraints

COUNT, IMAGES = 16, 400
BUDGET = Constraints(effective_bits=5.0)


def layers(count: int = COUNT) -> tuple[LayerInfo, ...]:
    rng = random.Random(5)
    return tuple(
        LayerInfo(
            name=f"l{i}", kind="linear", weight_shape=(1, 4 * rng.randint(10, 400)),
            out_channels=1, bias=False, macs=1000, in_elements=10, out_elements=10,
        )
        for i in range(count)
    )  # fmt: skip


def scored(factor: float, seed: int = 0, groups: tuple[tuple[str, ...], ...] = ()) -> Sensitivity:
    """Random scores at 8 and 4 bits; other seeds multiply them by up to `factor` or its inverse."""
    base, rng = random.Random(1), random.Random(seed)
    rows = []
    for info in layers():
        score = 10 ** base.uniform(-3.3, -2.7) * factor ** rng.uniform(-1, 1)
        rows += [Row(info.name, "weight", b, score / 256 ** (b == 8)) for b in (8, 4)]
        rows.append(Row(info.name, "activation", 8, 0.0))
    return Sensitivity(tuple(rows), layers(), groups, "fisher", 8, 0, "key")


def measuring(
    truth: Sensitivity, noise: float = 0.0, seed: int = 0
) -> Callable[[Allocation], Vector]:
    """Cost of each image: shared between configurations but for a part of it."""
    rng = np.random.default_rng(seed)
    shared = rng.exponential(size=IMAGES)
    shared /= shared.mean()

    def measure(found: Allocation) -> Vector:
        own = rng.standard_normal(IMAGES) * noise
        return truth.predict(found.widths) * (shared + own)

    return measure


def run(scores: Sensitivity, truth: Sensitivity, count: int, noise: float = 0.0) -> Refined:
    solve = lambda told: allocate(told, BUDGET)  # noqa: E731
    return refine(scores, solve, measuring(truth, noise), measuring(truth, noise, 1), count=count)


def test_refining_finds_what_the_true_costs_would_have_found() -> None:
    scores, truth = scored(1.0), scored(8.0, seed=4)
    best = truth.predict(allocate(truth, BUDGET).widths)
    found = run(scores, truth, 25, noise=0.3)
    costs = [truth.predict(t.allocation.widths) for t in found.trials]
    assert costs[0] > 1.2 * best
    assert truth.predict(found.chosen.allocation.widths) < 1.05 * best
    assert all(t.allocation.effective_bits <= 5.0 for t in found.trials)
    widths = [str(t.allocation.widths) for t in found.trials]
    assert len(set(widths)) == len(widths) <= 25


def test_measured_scores_rank_layers_better_than_those_before() -> None:
    def rho(told: Sensitivity, truth: Sensitivity) -> float:
        pairs = zip(told.rows, truth.rows, strict=True)
        both = np.array([(a.score, b.score) for a, b in pairs if a.bits == 4])
        return float(spearmanr(*both.T)[0])

    gains = []
    for seed in range(4, 10):  # what one of them gains depends on which of equals a solver returns
        scores, truth = scored(1.0), scored(8.0, seed=seed)
        fitted = run(scores, truth, 40).scores
        gains.append(rho(fitted, truth) - rho(scores, truth))
        assert all(r.score == 0 for r in fitted.rows if r.part == "activation")
        assert min(r.score for r in fitted.rows) >= 0
    assert min(gains) >= 0
    assert np.mean(gains) > 0.3


def test_the_search_answer_stays_where_nothing_beats_it_by_more_than_the_noise() -> None:
    scores = scored(1.0)
    found = run(scores, scores, 12, noise=0.5)
    assert found.chosen is found.trials[0]
    assert found.chosen.allocation == allocate(scores, BUDGET)
    assert found.scores is scores
    assert not found.taken


def test_a_winner_that_does_not_hold_on_other_images_is_not_taken() -> None:
    scores, truth = scored(1.0), scored(8.0, seed=4)
    found = refine(
        scores,
        lambda told: allocate(told, BUDGET),
        measuring(truth, 0.3),
        lambda found: np.tile([0.9, 1.1], 50),
        count=15,
    )
    assert min(t.mean for t in found.trials) < 0.8 * found.trials[0].mean
    assert found.again == (0.0, 0.0)
    assert not found.taken
    assert found.chosen is found.trials[0]


def test_a_better_one_beats_the_first_by_its_margin_on_other_images() -> None:
    found = run(scored(1.0), scored(8.0, seed=4), 15, noise=0.3)
    assert found.taken
    assert found.again is not None
    assert found.again[0] < -MARGIN * found.again[1] < 0
    assert found.chosen.mean == min(t.mean for t in found.trials)
    assert found.chosen.allocation.objective == pytest.approx(
        found.scores.predict(found.chosen.allocation.widths)
    )


def test_groups_and_locked_layers_stay_as_they_must() -> None:
    scores = scored(1.0, groups=(("l0", "l1"),))
    rows = tuple(
        dataclasses.replace(r, bits=b, score=1e-3 / b) if r.part == "activation" else r
        for r in scores.rows
        for b in ((8, 4) if r.part == "activation" else (r.bits,))
    )
    scores, limits = dataclasses.replace(scores, rows=rows), Constraints(max_bops=4.5e-4)

    def solve(told: Sensitivity) -> Allocation:
        return allocate(told, limits, locked={"l2": (8, 8)})

    found = refine(scores, solve, measuring(scores, 0.2), measuring(scores, 0.2), count=10)
    assert len(found.trials) > 1
    for trial in found.trials:
        widths = trial.allocation.widths
        assert widths["l0"][1] == widths["l1"][1]
        assert widths["l2"] == (8, 8)
        assert trial.allocation.bitops <= 4.5e5


def test_it_ends_where_there_is_nothing_else_to_measure() -> None:
    scores = scored(1.0)
    told: list[tuple[int, int]] = []
    found = refine(
        scores,
        lambda changed: allocate(changed, Constraints(effective_bits=4)),
        measuring(scores),
        measuring(scores),
        count=5,
        told=lambda done, total: told.append((done, total)),
    )
    assert len(found.trials) == 1
    assert found.chosen.allocation.effective_bits == 4
    assert told == [(1, 5)]


def test_equal_seeds_measure_the_same_configurations() -> None:
    runs = [run(scored(1.0), scored(8.0, seed=4), 6) for _ in range(2)]
    first, second = ([t.allocation.widths for t in r.trials] for r in runs)
    assert first == second
