"""The least cost at which a measured accuracy still holds: bisection over a budget. Free of torch.

Scores rank configurations, they do not promise points of accuracy. So the budget is found by
measuring: each step solves the search at the middle of the interval, measures what it found, and
halves the interval (AIMET searches its accuracy targets so, one layer at a time).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpq.analyze.cost import Allocation
from mpq.errors import InfeasibleError
from mpq.layers import Widths

STEPS = 7
"""Halvings: the budget is found to 1/128 of its range."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A configuration that was measured, and the drop that it showed.

    `interval` is that of the drop, 95 %, where a metric of the user's choice gives one.
    """

    allocation: Allocation
    drop: float
    interval: tuple[float, float] | None = None


def least_cost(
    at: Callable[[float], Allocation],
    span: tuple[float, float],
    measure: Callable[[Allocation], float],
    *,
    max_drop: float,
    steps: int = STEPS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Measured]:
    """Find the cheapest configuration whose measured drop is at most `max_drop`.

    Measured drops rise only by and large as the budget falls. What is returned has been measured
    and holds; a cheaper one that would hold too may lie beyond one that does not.

    Args:
        at: the best configuration within a budget.
        span: least and greatest value of the budget.
        measure: drop of a configuration, in the unit of `max_drop`; equal configurations are
            measured once.
        max_drop: what is allowed.
        steps: halvings of the interval.
        progress: called with (steps done, steps).

    Returns:
        All that was measured, the answer first, then in the order of measuring.

    Raises:
        InfeasibleError: even the greatest budget drops more; the message has what was measured.
    """
    seen: dict[tuple[tuple[str, Widths], ...], Measured] = {}

    def holds(budget: float) -> Measured | None:
        allocation = at(budget)
        key = tuple(sorted(allocation.widths.items(), key=str))
        if key not in seen:
            seen[key] = Measured(allocation, measure(allocation))
        return seen[key] if seen[key].drop <= max_drop else None

    low, high = span
    best = holds(high)
    if best is None:
        (first,) = seen.values()
        raise InfeasibleError(
            f"max_drop must be at least {first.drop:.3g}, which is the drop measured at the "
            f"greatest budget ({first.allocation.effective_bits:.2f} effective bits, "
            f"{first.allocation.bytes:,} bytes). Got {max_drop:g}. Allow more, wider choices with "
            "--bits, or train with mpq qat."
        )
    cheapest = holds(low)
    for step in range(0 if cheapest else steps):
        if progress:
            progress(step, steps)
        middle = (low + high) / 2
        found = holds(middle)
        best, low, high = (best, middle, high) if found is None else (found, low, middle)
    best = cheapest or best
    return [best, *(m for m in seen.values() if m is not best)]
