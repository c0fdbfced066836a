"""Choose widths: an exact 0/1 program over the candidates of every layer. Free of torch.

The program is `problem`, the solver `solver`: HAWQ-V3's integer program (Z. Yao et al., 2021) for
any combination of budgets, solved to a gap of zero in milliseconds. One scoring serves any number
of budgets.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpq.analyze import cost
from mpq.analyze.limits import LIMITS
from mpq.analyze.problem import Problem
from mpq.analyze.sensitivity import Sensitivity
from mpq.errors import UsageError, nearest
from mpq.latency import LatencyProfile
from mpq.layers import Widths
from mpq.policy import Constraints
from mpq.target import ONNXRUNTIME_CPU, Target


@dataclass(frozen=True, slots=True)
class Allocation:
    """A solved configuration.

    Args:
        widths: (weight bits, activation bits) of each layer, None for float.
        objective: predicted increase of the loss: the sum of the chosen scores.
        effective_bits: mean width of the weights.
        bitops: MACs x weight bits x activation bits, per image.
        weight_bytes: bytes of the weights alone.
        bytes: predicted bytes of the exported file.
        activation_bytes: peak of the activations alive at one time (`cost.activation_bytes`); None
            where the scores do not know the network's tensors.
        latency_ms: as the latency profile predicts it; None without one.
        status: `optimal`, as proved by the solver, or `best found` where it ran out of time.
        gap: relative distance to the proved bound.
    """

    widths: dict[str, Widths]
    objective: float
    effective_bits: float
    bitops: float
    weight_bytes: int
    bytes: int
    activation_bytes: int | None = None
    latency_ms: float | None = None
    status: str = "optimal"
    gap: float = 0.0

    def to_json(self) -> dict[str, object]:
        """An entry of `front` in `sensitivity.json`."""
        return {
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "effective_bits": self.effective_bits,
            "bytes": self.bytes,
            "bitops": self.bitops,
            "activation_bytes": self.activation_bytes,
            "latency_ms": self.latency_ms,
            "predicted_drop": self.objective,
        }


def candidates(bits: Sequence[int], act_bits: Sequence[int] = (8,)) -> list[Widths]:
    """Pairs to choose from: each narrow width with each activation width, 16 only with 16."""
    narrow = itertools.product((b for b in bits if b < 16), (a for a in act_bits if a < 16))
    wide: list[Widths] = [(16, 16)] if 16 in bits else []
    return [*wide, *dict.fromkeys(narrow)]


def allocate(
    sensitivity: Sensitivity,
    constraints: Constraints,
    *,
    target: Target = ONNXRUNTIME_CPU,
    pairs: Sequence[Widths] | None = None,
    locked: Mapping[str, Widths] | None = None,
    profile: LatencyProfile | None = None,
) -> Allocation:
    """The configuration of least predicted loss within the budgets.

    Args:
        sensitivity: scores; nothing is measured here.
        constraints: budgets; those that are None do not bind.
        target: which pairs exist, and what a layer costs in the file.
        pairs: what a layer may have; by default every pair of widths that was scored.
        locked: widths that are given, by layer; they count in every budget.
        profile: measured times, for `max_latency_ms`.

    Raises:
        InfeasibleError: no configuration meets the budgets; the message has the achievable range.
        PolicyError: a locked layer does not exist, locks contradict a group, or a budget lacks what
            it is computed from.
        UsageError: `max_drop`, which has to be measured (`mpq.analyze.least_cost`).
    """
    if constraints.max_drop is not None:
        raise UsageError(
            "max_drop must be measured on images, which allocate never sees. Use "
            "mpq.analyze.least_cost with a function that measures, or `mpq analyze --max-drop`."
        )
    problem = _problem(sensitivity, constraints, target, pairs, locked, profile)
    return _solve(problem)


def pareto_front(
    sensitivity: Sensitivity,
    constraints: Constraints,
    *,
    target: Target = ONNXRUNTIME_CPU,
    pairs: Sequence[Widths] | None = None,
    locked: Mapping[str, Widths] | None = None,
    profile: LatencyProfile | None = None,
    sweep: str = "effective_bits",
    points: int = 20,
    also: Sequence[Allocation] = (),
) -> list[Allocation]:
    """Configurations that no other beats in both the swept limit and predicted loss.

    Args:
        sensitivity: as for `allocate`, like the arguments that are not named here.
        constraints: budgets in force for every point, but for the swept one.
        target: as for `allocate`.
        pairs: as for `allocate`.
        locked: as for `allocate`.
        profile: as for `allocate`.
        sweep: the limit that is swept, one of `mpq.analyze.limits.LIMITS`.
        points: budgets to try, evenly spaced over the achievable range.
        also: allocations that belong to the list whatever they are, such as the one chosen.

    Returns:
        By rising value of the swept limit.

    Raises:
        InfeasibleError, PolicyError: as `allocate`.
        UsageError: an unknown `sweep`.
    """
    _check_limit(sweep)
    free = constraints.without(sweep)
    widest = _problem(sensitivity, free, target, pairs, locked, profile)
    found = list(also)
    for budget in np.linspace(*widest.range_of(sweep), points):
        swept = free.with_limit(sweep, float(budget))
        found.append(_solve(_problem(sensitivity, swept, target, pairs, locked, profile)))
    value = widest.limits[sweep].measure
    return _front(found, {id(a): value(a.widths) for a in found}, also)


def limit_range(
    sensitivity: Sensitivity,
    constraints: Constraints,
    limit: str,
    *,
    target: Target = ONNXRUNTIME_CPU,
    pairs: Sequence[Widths] | None = None,
    locked: Mapping[str, Widths] | None = None,
    profile: LatencyProfile | None = None,
) -> tuple[float, float]:
    """Least and greatest achievable value of one limit, with the other budgets in force.

    Args:
        sensitivity: as for `allocate`, like the arguments that are not named here.
        constraints: the budgets; that of `limit` itself is left aside.
        limit: one of `mpq.analyze.limits.LIMITS`.
        target: as for `allocate`.
        pairs: as for `allocate`.
        locked: as for `allocate`.
        profile: as for `allocate`.

    Raises:
        InfeasibleError, PolicyError: as `allocate`.
        UsageError: an unknown limit.
    """
    _check_limit(limit)
    free = constraints.without(limit)
    return _problem(sensitivity, free, target, pairs, locked, profile).range_of(limit)


def _check_limit(name: str) -> None:
    if name not in LIMITS:
        raise UsageError(
            f"the limit must be one of {', '.join(LIMITS)}. Got {name!r}{nearest(name, LIMITS)}"
        )


def _front(
    found: list[Allocation], values: Mapping[int, float], also: Sequence[Allocation]
) -> list[Allocation]:
    found.sort(key=lambda a: (values[id(a)], a.objective))
    front: list[Allocation] = []
    best = math.inf
    for allocation in found:
        new = all(allocation.widths != other.widths for other in front)
        if new and (allocation.objective < best or allocation in also):
            front.append(allocation)
        best = min(best, allocation.objective)
    return front


def _problem(
    sensitivity: Sensitivity,
    constraints: Constraints,
    target: Target,
    pairs: Sequence[Widths] | None,
    locked: Mapping[str, Widths] | None,
    profile: LatencyProfile | None,
) -> Problem:
    if pairs is None:
        pairs = candidates(sensitivity.bits("weight"), sensitivity.bits("activation"))
    return Problem(
        sensitivity, constraints, target=target, pairs=pairs, locked=locked or {}, profile=profile
    )


def _solve(problem: Problem) -> Allocation:
    found = problem.best(problem.program(problem.scores, list(problem.budgets)))
    if found is None:
        raise problem.infeasible()
    return describe(problem, *found)


def describe(problem: Problem, widths: dict[str, Widths], gap: float) -> Allocation:
    """A configuration with all that it costs."""
    layers, moments = problem.sensitivity.layers, problem.sensitivity.moments
    chosen, latency = set(widths.items()), problem.limits.get("max_latency_ms")
    picked = [s for key, s in zip(problem.keys, problem.scores, strict=False) if key in chosen]
    return Allocation(
        widths=widths,
        objective=math.fsum(picked),
        effective_bits=cost.effective_bits(layers, widths),
        bitops=cost.bitops(layers, widths),
        weight_bytes=cost.weight_bytes(layers, widths),
        bytes=cost.predicted_bytes(layers, widths, problem.target),
        activation_bytes=cost.activation_bytes(moments, widths) if moments else None,
        latency_ms=latency.measure(widths) if latency else None,
        status="optimal" if gap == 0 else "best found",
        gap=gap,
    )
