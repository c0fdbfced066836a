"""Choose widths: an exact 0/1 program over the candidates of every layer. Free of torch.

The program is `problem`, the solver `solver`: HAWQ-V3's integer program (Z. Yao et al., 2021) for
any combination of budgets, solved to a gap of zero in milliseconds. One scoring serves any number
of budgets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mpq.analyze import cost
from mpq.analyze.cost import Allocation
from mpq.analyze.drop import Measured, least_cost
from mpq.analyze.limits import LIMITS
from mpq.analyze.problem import Problem
from mpq.analyze.sensitivity import Sensitivity
from mpq.errors import UsageError, nearest
from mpq.latency import LatencyProfile
from mpq.layers import Widths
from mpq.policy import Constraints
from mpq.target import Target
from mpq.targets import ONNXRUNTIME_CPU


def candidates(bits: Sequence[int], act_bits: Sequence[int] = (8,)) -> list[Widths]:
    """Pairs to choose from: each narrow width with each activation width, 16 only with 16."""
    narrow = itertools.product((b for b in bits if b < 16), (a for a in act_bits if a < 16))
    wide: list[Widths] = [(16, 16)] if 16 in bits else []
    return [*wide, *dict.fromkeys(narrow)]


def allocate(scores: Sensitivity, constraints: Constraints) -> Allocation:
    """The configuration of least predicted loss within the budgets; see `Search` for more."""
    return Search(scores).allocate(constraints)


@dataclass(frozen=True)
class Search:
    """The scores of a network and what its layers may have: answers any number of budgets.

    Args:
        scores: of every candidate; nothing is measured here.
        target: which pairs of widths exist, and what a layer costs in the file.
        widths: pairs to choose from; None: every pair of widths that was scored.
        locked: widths that are given, by layer; they count in every budget.
        profile: measured times, for `max_latency_ms`.

    Its methods raise:
        InfeasibleError: no configuration meets the budgets; the message has the achievable range.
        PolicyError: a locked layer does not exist, locks contradict a group, the target lacks a
            pair, or a budget lacks what it is computed from.
        UsageError: an unknown limit.
    """

    scores: Sensitivity
    target: Target = ONNXRUNTIME_CPU
    widths: Sequence[Widths] | None = None
    locked: Mapping[str, Widths] = field(default_factory=dict)
    profile: LatencyProfile | None = None

    def allocate(self, constraints: Constraints) -> Allocation:
        """The configuration of least predicted loss within the budgets; those of None do not bind.

        Raises:
            UsageError: `max_drop`, which has to be measured (`least`).
        """
        if constraints.max_drop is not None:
            raise UsageError(
                "max_drop must be measured on images, which allocate never sees. Use Search.least "
                "with a function that measures, or `mpq analyze --max-drop`."
            )
        problem = self._problem(constraints)
        found = problem.best(problem.program(problem.scores, list(problem.budgets)))
        if found is None:
            raise problem.infeasible()
        return _described(problem, *found)

    def range(self, constraints: Constraints, limit: str) -> tuple[float, float]:
        """Least and greatest value of a limit, one of `LIMITS`, with the other budgets in force."""
        return self._without(constraints, limit).range_of(limit)

    def front(
        self,
        constraints: Constraints,
        *,
        sweep: str = "effective_bits",
        points: int = 20,
        also: Sequence[Allocation] = (),
    ) -> list[Allocation]:
        """Configurations that no other beats in both a swept limit and predicted loss.

        Args:
            constraints: budgets in force for every point, but for the swept one.
            sweep: the limit that is swept, one of `LIMITS`.
            points: budgets to try, evenly spaced over the achievable range.
            also: allocations that belong to the list whatever they are, such as the one chosen.

        Returns:
            By rising value of the swept limit.
        """
        widest, rest = self._without(constraints, sweep), constraints.without(sweep)
        budgets = np.linspace(*widest.range_of(sweep), points)
        solved = [self.allocate(rest.with_limit(sweep, float(budget))) for budget in budgets]
        value = widest.limits[sweep].measure
        return _front([(value(a.widths), a) for a in (*also, *solved)], also)

    def least(
        self,
        constraints: Constraints,
        measure: Callable[[Allocation], float],
        *,
        minimize: str = "effective_bits",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Measured]:
        """The cheapest configuration whose measured drop is at most `max_drop`, by bisection.

        Args:
            constraints: `max_drop`, and budgets in force.
            measure: drop of a configuration, in the unit of `max_drop`.
            minimize: what it shall cost least of, one of `LIMITS`.
            progress: called with (steps done, steps).

        Returns:
            All that was measured, the answer first (see `least_cost`).
        """
        if constraints.max_drop is None:
            raise UsageError("least needs the max_drop that is allowed. Got constraints without.")
        rest = constraints.without()
        cap = constraints.budgets().get(minimize, math.inf)
        low, high = self.range(rest, minimize)
        return least_cost(
            lambda value: self.allocate(rest.with_limit(minimize, value)),
            (min(low, cap), min(high, cap)),
            measure,
            max_drop=constraints.max_drop,
            progress=progress,
        )

    def _without(self, constraints: Constraints, limit: str) -> Problem:
        """The program with all budgets but that one."""
        if limit not in LIMITS:
            known = ", ".join(LIMITS)
            raise UsageError(
                f"the limit must be one of {known}. Got {limit!r}{nearest(limit, LIMITS)}"
            )
        return self._problem(constraints.without(limit))

    def _problem(self, constraints: Constraints) -> Problem:
        scored = self.scores.bits("weight"), self.scores.bits("activation")
        return Problem(
            self.scores,
            constraints,
            target=self.target,
            pairs=candidates(*scored) if self.widths is None else self.widths,
            locked=self.locked,
            profile=self.profile,
        )


def _front(found: list[tuple[float, Allocation]], also: Sequence[Allocation]) -> list[Allocation]:
    """Those of (value, allocation) that no other beats, and `also`."""
    front: list[Allocation] = []
    best = math.inf
    for _, allocation in sorted(found, key=lambda pair: (pair[0], pair[1].objective)):
        new = all(allocation.widths != other.widths for other in front)
        if new and (allocation.objective < best or allocation in also):
            front.append(allocation)
        best = min(best, allocation.objective)
    return front


def _described(problem: Problem, widths: dict[str, Widths], gap: float) -> Allocation:
    """A configuration with all that it costs."""
    scores, layers = problem.sensitivity, problem.sensitivity.layers
    live_sets, besides = scores.live_sets, scores.besides
    chosen, latency = set(widths.items()), problem.limits.get("max_latency_ms")
    picked = [s for key, s in zip(problem.keys, problem.scores, strict=False) if key in chosen]
    return Allocation(
        widths=widths,
        objective=math.fsum(picked),
        effective_bits=cost.effective_bits(layers, widths),
        bitops=cost.bitops(layers, widths, besides),
        weight_bytes=cost.weight_bytes(layers, widths),
        bytes=cost.predicted_bytes(layers, widths, problem.target, besides),
        activation_bytes=cost.activation_bytes(live_sets, widths) if live_sets else None,
        latency_ms=latency.measure(widths) if latency else None,
        status="optimal" if gap == 0 else "best found",
        gap=gap,
    )
