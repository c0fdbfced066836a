"""Measured refinement: correct the scores by what whole configurations are measured to cost.

Scores describe one layer that is changed alone. What post-training quantization leaves is another
thing: each layer is rounded on the output of those before it and takes back some of their error. So
a few dozen configurations are quantized and measured, and the scores are fitted to them: a linear
model of the cost with the scores, brought to the scale of the first measurement, as its prior
(Bayesian linear regression). What is measured next is the exact search's answer to scores drawn
from the posterior (W. Thompson, "On the Likelihood that One Unknown Probability Exceeds Another",
1933), so that every configuration keeps all budgets, groups and locks, and doubt about a layer is
resolved where it could change the answer. The least of many noisy values is too low, so the winner
is measured again beside the search's own answer, on other images and after another calibration.
Free of torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mpq.analyze.cost import Widths
from mpq.analyze.search import Allocation
from mpq.analyze.sensitivity import PARTS, Sensitivity

Vector = NDArray[np.float64]
SPREAD = 1.0
"""Prior standard deviation of a score, relative to it and to the mean score of its part and width
in equal parts: a layer whose score is next to nothing may be wrong as well."""
DOUBT = 0.03
"""What the linear model is trusted to at best: relative to the first measured cost."""
MARGIN = 2.0
"""Standard errors of the paired difference by which the winner must beat the search's answer."""
DRAWS = 20
"""Draws without a configuration that is new after which there is nothing more to measure."""


@dataclass(frozen=True)
class Trial:
    """A configuration that was measured.

    Args:
        allocation: what was measured.
        losses: cost of each image `[N]`, in nats; the same images in every trial.
    """

    allocation: Allocation
    losses: Vector

    @property
    def mean(self) -> float:
        """Mean cost."""
        return float(self.losses.mean())

    def against(self, other: Trial) -> tuple[float, float]:
        """Mean of the paired difference to another trial, and its standard error."""
        off = self.losses - other.losses
        return float(off.mean()), float(off.std(ddof=1) / np.sqrt(len(off)))


@dataclass(frozen=True)
class Refined:
    """The outcome of a refinement.

    Args:
        chosen: the least costly configuration of the trials if it held when it was measured again,
            else the first one, which is the search's own answer.
        trials: all that was measured.
        scores: as fitted to the measurements where they chose, else as they were.
        again: what the least costly one costs more than the first, with its standard error, when
            both were measured again; None where the first was the least costly.
    """

    chosen: Trial
    trials: tuple[Trial, ...]
    scores: Sensitivity
    again: tuple[float, float] | None

    @property
    def taken(self) -> bool:
        """Whether another configuration than the search's own was chosen."""
        return self.again is not None and _holds(*self.again)


def _holds(off: float, error: float) -> bool:
    return off < -MARGIN * error


def refine(
    scores: Sensitivity,
    solve: Callable[[Sensitivity], Allocation],
    measure: Callable[[Allocation], Vector],
    again: Callable[[Allocation], Vector],
    *,
    count: int,
    seed: int = 0,
    told: Callable[[int, int], None] | None = None,
) -> Refined:
    """Measure `count` configurations and choose among them.

    Args:
        scores: where to begin.
        solve: the best configuration within the budgets, by such scores.
        measure: cost of a configuration for each of the same images, two or more.
        again: the same on other images, after another calibration.
        count: configurations to measure, at least 1; fewer where there are not so many.
        seed: of the draws.
        told: called with (measured, count).
    """
    rng = np.random.default_rng(seed)
    trials: list[Trial] = []
    model = _Model(scores)
    allocation: Allocation | None = solve(scores)
    while allocation is not None:
        trials.append(Trial(allocation, measure(allocation)))
        if told:
            told(len(trials), count)
        mean, root = model.fit(trials)
        if len(trials) >= count:
            break
        allocation = _unseen(model, solve, trials, mean, root, rng)
    first, best = trials[0], min(trials, key=lambda t: t.mean)
    if best is first:
        return Refined(first, tuple(trials), scores, None)
    pair = [Trial(t.allocation, again(t.allocation)) for t in (best, first)]
    found = pair[0].against(pair[1])
    if not _holds(*found):
        return Refined(first, tuple(trials), scores, found)
    fitted = model.scores_of(mean)
    priced = dataclasses.replace(best.allocation, objective=fitted.predict(best.allocation.widths))
    return Refined(Trial(priced, best.losses), tuple(trials), fitted, found)


def _unseen(
    model: _Model,
    solve: Callable[[Sensitivity], Allocation],
    trials: Sequence[Trial],
    mean: Vector,
    root: Vector,
    rng: np.random.Generator,
) -> Allocation | None:
    """The answer to scores drawn from the posterior, if it has not been measured yet."""
    seen = [t.allocation.widths for t in trials]
    for _ in range(DRAWS):
        drawn = mean + root @ rng.standard_normal(len(mean))
        found = solve(model.scores_of(drawn))
        if found.widths not in seen:
            return found
    return None


class _Model:
    """Cost of a configuration as a sum over its candidates: prior, and fit to measurements."""

    def __init__(self, scores: Sensitivity) -> None:
        self.scores = scores
        self.prior = np.array([row.score for row in scores.rows])
        kinds = np.array([PARTS.index(row.part) * 100 + row.bits for row in scores.rows])
        means = {k: self.prior[kinds == k].mean() for k in set(kinds.tolist())}
        typical = np.array([means[k] for k in kinds.tolist()])
        self.spread = SPREAD * (self.prior + typical) / 2

    def row(self, widths: Mapping[str, Widths]) -> Vector:
        """Which candidates a configuration holds, 0 or 1 each."""
        held = {(n, p, b) for n, pair in widths.items() for p, b in zip(PARTS, pair, strict=True)}
        return np.array([float((r.layer, r.part, r.bits) in held) for r in self.scores.rows])

    def fit(self, trials: Sequence[Trial]) -> tuple[Vector, Vector]:
        """Mean of the posterior, and a root of its covariance `[rows, rows]`."""
        x = np.stack([self.row(t.allocation.widths) for t in trials])
        first = trials[0]
        predicted = float(x[0] @ self.prior)
        scale = first.mean / predicted if predicted > 0 and first.mean > 0 else 1.0
        mean, covariance = scale * self.prior, np.diag((scale * self.spread) ** 2)
        errors = [t.against(first)[1] for t in trials]
        noise = np.hypot(errors, max(DOUBT * abs(first.mean), 1e-12))
        against = x @ covariance
        gain = np.linalg.solve(against @ x.T + np.diag(noise**2), against).T
        mean = mean + gain @ (np.array([t.mean for t in trials]) - x @ mean)
        values, vectors = np.linalg.eigh(covariance - gain @ against)
        return mean, vectors * np.sqrt(values.clip(min=0))

    def scores_of(self, values: Vector) -> Sensitivity:
        """The scores with other values; none is below 0, and none without noise has any."""
        kept = np.where(self.prior > 0, values.clip(min=0), 0.0).tolist()
        rows = zip(self.scores.rows, kept, strict=True)
        changed = tuple(dataclasses.replace(row, score=value) for row, value in rows)
        return dataclasses.replace(self.scores, rows=changed, pairwise=None)
