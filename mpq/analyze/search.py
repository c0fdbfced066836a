"""Choose widths: an exact 0/1 program over the candidates of every layer. Free of torch.

    minimise   sum_lc score_lc x_lc
    subject to sum_c x_lc = 1 for every layer l,
               sum_lc cost_lc x_lc <= budget for effective bits, bytes and BitOps,
               equal activation widths among layers that read one tensor

as in HAWQ-V3 (Z. Yao et al., 2021), solved to a gap of zero by HiGHS (`scipy.optimize.milp`) in
milliseconds. One scoring serves any number of budgets.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

from mpq.analyze import cost
from mpq.analyze.cost import Widths
from mpq.analyze.sensitivity import PARTS, Sensitivity, by_name
from mpq.errors import InfeasibleError, PolicyError
from mpq.policy import Constraints
from mpq.target import ONNXRUNTIME_CPU, Target

logger = logging.getLogger(__name__)
Vector = NDArray[np.float64]

OBJECTIVE_SCALE = 1e4
"""HiGHS stops within 1e-6 of the best objective, absolutely: the largest score becomes this."""
MAX_CUTS = 100


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
        status: `optimal`, as proved by the solver.
        gap: relative distance to the proved bound.
    """

    widths: dict[str, Widths]
    objective: float
    effective_bits: float
    bitops: float
    weight_bytes: int
    bytes: int
    status: str = "optimal"
    gap: float = 0.0

    def to_json(self) -> dict[str, object]:
        """An entry of `front` in `sensitivity.json`."""
        return {
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "effective_bits": self.effective_bits,
            "bytes": self.bytes,
            "bitops": self.bitops,
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
) -> Allocation:
    """The configuration of least predicted loss within the budgets.

    Args:
        sensitivity: scores; nothing is measured here.
        constraints: budgets; those that are None do not bind.
        target: which pairs exist, and what a layer costs in the file.
        pairs: what a layer may have; by default every pair of widths that was scored.
        locked: widths that are given, by layer; they count in every budget.

    Raises:
        InfeasibleError: no configuration meets the budgets; the message has the achievable range.
        PolicyError: a locked layer does not exist, or locks contradict a group.
    """
    return _Problem(sensitivity, constraints, target, pairs, locked or {}).solve()


def pareto_front(
    sensitivity: Sensitivity,
    constraints: Constraints,
    *,
    target: Target = ONNXRUNTIME_CPU,
    pairs: Sequence[Widths] | None = None,
    locked: Mapping[str, Widths] | None = None,
    points: int = 20,
    also: Sequence[Allocation] = (),
) -> list[Allocation]:
    """Configurations that no other beats in both effective bits and predicted loss.

    Args:
        sensitivity: as for `allocate`, like the arguments that are not named here.
        constraints: budgets in force for every point, but for `effective_bits`, which is swept.
        target: as for `allocate`.
        pairs: as for `allocate`.
        locked: as for `allocate`.
        points: budgets to try, evenly spaced over the achievable range.
        also: allocations that belong to the list whatever they are, such as the one chosen.

    Returns:
        By rising effective bits.
    """
    free = constraints.model_copy(update={"effective_bits": None})
    low, high = _Problem(sensitivity, free, target, pairs, locked or {}).range_of("effective_bits")
    found = list(also)
    for budget in np.linspace(low, high, points):
        swept = free.model_copy(update={"effective_bits": float(budget)})
        found.append(_Problem(sensitivity, swept, target, pairs, locked or {}).solve())
    found.sort(key=lambda a: (a.effective_bits, a.objective))
    front: list[Allocation] = []
    best = math.inf
    for allocation in found:
        new = all(allocation.widths != other.widths for other in front)
        if new and (allocation.objective < best or allocation in also):
            front.append(allocation)
        best = min(best, allocation.objective)
    return front


class _Problem:
    """One 0/1 program: a variable per layer and candidate, in `keys`."""

    def __init__(
        self,
        sensitivity: Sensitivity,
        constraints: Constraints,
        target: Target,
        pairs: Sequence[Widths] | None,
        locked: Mapping[str, Widths],
    ) -> None:
        self.sensitivity, self.target = sensitivity, target
        self.layers = by_name(sensitivity.layers)
        if pairs is None:
            pairs = candidates(sensitivity.bits("weight"), sensitivity.bits("activation"))
        for name in locked:
            if name not in self.layers:
                raise PolicyError(f"a locked layer must be one of the network's. Got {name!r}.")
        self.pairs, self.locked = pairs, dict(locked)
        self.keys = [(n, p) for n in self.layers for p in self._pairs_of(n)]
        self.scores = np.array([self._score(n, p) for n, p in self.keys])
        self.costs = self._costs()
        self.budgets = _budgets(constraints)

    def _pairs_of(self, name: str) -> Sequence[Widths]:
        if name in self.locked:
            return [self.locked[name]]
        for pair in self.pairs:
            self.target.support(*pair)
        return self.pairs

    def _score(self, name: str, pair: Widths) -> float:
        if name not in self.locked:
            return sum(
                self.sensitivity.score(name, part, b) for part, b in zip(PARTS, pair, strict=True)
            )
        # A locked width that was not scored changes no decision.
        known = {(r.part, r.bits): r.score for r in self.sensitivity.rows if r.layer == name}
        return sum(known.get((part, b or 0), 0.0) for part, b in zip(PARTS, pair, strict=True))

    def _costs(self) -> dict[str, Vector]:
        """Cost of each variable, in units whose sums are exact in float64: bits, bytes, BitOps."""
        of = [(self.layers[n], pair) for n, pair in self.keys]
        return {
            "effective_bits": np.array([float(i.params * (p[0] or 32)) for i, p in of]),
            "max_size_mb": np.array([float(cost.layer_bytes(i, p[0], self.target)) for i, p in of]),
            "max_bops": np.array([i.bitops(*p) for i, p in of]),
        }

    def unit(self, name: str) -> float:
        """What one unit of a constraint is in units of `costs`."""
        params = float(sum(layer.params for layer in self.layers.values()))
        return {"effective_bits": params, "max_size_mb": 1e6, "max_bops": 1e9}[name]

    def _structure(self) -> list[LinearConstraint]:
        """One candidate per layer, and agreement within groups."""
        rows: list[Vector] = []
        right: list[float] = []
        for name in self.layers:
            rows.append(np.array([float(n == name) for n, _ in self.keys]))
            right.append(1.0)
        for group in self.sensitivity.groups:
            first, *others = group
            formats = {p[1] for n, p in self.keys if n in group}
            for other, bits in itertools.product(others, formats):
                signs = {first: 1.0, other: -1.0}
                rows.append(
                    np.array([signs.get(n, 0.0) if p[1] == bits else 0.0 for n, p in self.keys])
                )
                right.append(0.0)
        return [LinearConstraint(np.array(rows), right, right)]

    def _within(self, names: Sequence[str]) -> list[LinearConstraint]:
        # Divided by the budget, because the solver's tolerance of 1e-6 is absolute.
        limits = {name: self.budgets[name] * self.unit(name) for name in names}
        return [LinearConstraint(self.costs[n][None] / limits[n], -np.inf, 1.0) for n in names]

    def _milp(
        self, objective: Vector, constraints: Sequence[LinearConstraint]
    ) -> tuple[Vector, float] | None:
        """The best 0/1 vector and its gap; None if there is none."""
        scale = OBJECTIVE_SCALE / max(float(np.abs(objective).max(initial=0.0)), 1e-300)
        result = milp(
            objective * scale,
            integrality=np.ones(len(objective)),
            bounds=Bounds(0, 1),
            constraints=list(constraints),
            # Without presolve: mapping a solution back, HiGHS 1.12 may write to the C stdout.
            options={"mip_rel_gap": 0.0, "presolve": False},
        )
        if result.x is None:
            if result.status not in (2, 4):  # neither infeasible nor infeasible-or-unbounded
                raise PolicyError(f"the solver stopped without an answer: {result.message}")
            return None
        return np.round(result.x), float(result.mip_gap or 0.0)

    def solve(self) -> Allocation:
        """Minimise the predicted loss.

        Raises:
            InfeasibleError: with the achievable range of every budget.
        """
        base = [*self._structure(), *self._within(list(self.budgets))]
        for _ in range(MAX_CUTS):
            found = self._milp(self.scores, base)
            if found is None:
                break
            x, gap = found
            if all(self._total(n, x) <= self.budgets[n] * (1 + 1e-12) for n in self.budgets):
                return self._allocation(x, gap)
            # Over budget by less than the solver's tolerance: forbid this one and go on.
            base.append(LinearConstraint(x[None], -np.inf, x.sum() - 1))
        raise self._infeasible()

    def _total(self, name: str, x: Vector) -> float:
        return float(self.costs[name] @ x) / self.unit(name)

    def _allocation(self, x: Vector, gap: float) -> Allocation:
        widths = {n: pair for (n, pair), chosen in zip(self.keys, x, strict=True) if chosen}
        layers = self.sensitivity.layers
        return Allocation(
            widths=widths,
            objective=float(self.scores @ x),
            effective_bits=cost.effective_bits(layers, widths),
            bitops=cost.bitops(layers, widths),
            weight_bytes=cost.weight_bytes(layers, widths),
            bytes=cost.predicted_bytes(layers, widths, self.target),
            gap=gap,
        )

    def range_of(self, name: str) -> tuple[float, float]:
        """Least and greatest value of one constraint, with the other budgets in force.

        Raises:
            InfeasibleError: the other budgets cannot be met.
        """
        others = [n for n in self.budgets if n != name]
        base = [*self._structure(), *self._within(others)]
        low, high = self._milp(self.costs[name], base), self._milp(-self.costs[name], base)
        if low is None or high is None:
            raise self._infeasible()
        return self._total(name, low[0]), self._total(name, high[0])

    def _infeasible(self) -> InfeasibleError:
        if self._milp(self.scores, self._structure()) is None:
            return InfeasibleError(
                "the widths of the layers contradict each other before any budget: a locked layer "
                "and another that reads the same tensor must agree on its activation width. "
                f"Groups: {[list(g) for g in self.sensitivity.groups]}; locked: {self.locked}."
            )
        parts = []
        for name, budget in self.budgets.items():
            others = [n for n in self.budgets if n != name]
            where = f" (with {', '.join(others)} in force)" if others else ""
            base = [*self._structure(), *self._within(others)]
            low = self._milp(self.costs[name], base)
            if low is None:  # the others alone are too tight: say what this one could be alone
                base, where = self._structure(), " (alone)"
                low = self._milp(self.costs[name], base)
            high = self._milp(-self.costs[name], base)
            assert low is not None
            assert high is not None
            reach = f"{self._total(name, low[0]):.6g}..{self._total(name, high[0]):.6g}"
            parts.append(f"{name} must be in {reach}{where}, got {budget:g}")
        widths = ", ".join(f"W{w or 32}A{a or 32}" for w, a in self.pairs)
        return InfeasibleError(
            f"no choice among {widths} meets the budget: {'; '.join(parts)}. "
            "Raise it, allow narrower widths with --bits, or unlock layers."
        )


def _budgets(constraints: Constraints) -> dict[str, float]:
    given = constraints.model_dump()
    return {name: float(value) for name, value in given.items() if value is not None}
