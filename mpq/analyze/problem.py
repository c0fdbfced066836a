"""The search as a 0/1 program: variables, structure, budgets, and what each can be. No torch.

    minimise   sum_lc score_lc x_lc
    subject to sum_c x_lc = 1 for every layer l,
               value of each limit <= its budget (`limits`),
               equal activation widths among layers that read one tensor

as in HAWQ-V3 (Z. Yao et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, hstack, vstack

from mpq.analyze.limits import Limit, conversions, limits, places_of, run_as_integers, sparse
from mpq.analyze.sensitivity import PARTS, Sensitivity, by_name
from mpq.analyze.solver import Program, solve
from mpq.errors import InfeasibleError, PolicyError
from mpq.latency import LatencyProfile
from mpq.layers import LayerChoice, Widths
from mpq.policy import Constraints
from mpq.target import Target

Vector = NDArray[np.float64]
MAX_CUTS = 100
_MISSING = {
    "max_activation_mb": "needs the activations of the network, which this sensitivity file of "
    "an older version lacks. Analyze again with --force.",
    "max_latency_ms": "needs measured times: `mpq profile MODEL` writes them, and --profile "
    "names the file.",
}


class Problem:
    """One network and what may be chosen for it.

    Variables `z`: one for each of `keys`, then one for each edge of the latency profile.
    """

    def __init__(
        self,
        sensitivity: Sensitivity,
        constraints: Constraints,
        *,
        target: Target,
        pairs: Sequence[Widths],
        locked: Mapping[str, Widths],
        profile: LatencyProfile | None,
    ) -> None:
        self.sensitivity, self.target, self.profile = sensitivity, target, profile
        self.layers = by_name(sensitivity.layers)
        for name in locked:
            if name not in self.layers:
                raise PolicyError(f"a locked layer must be one of the network's. Got {name!r}.")
        if profile:
            profile.check(self.layers)
        for pair in pairs:
            target.support(LayerChoice.at("any", *pair))
        self.pairs, self.locked = list(pairs), dict(locked)
        self.keys = [(n, p) for n in self.layers for p in ([locked[n]] if n in locked else pairs)]
        edges = len(profile.boundary_ms) if profile else 0
        self.size = len(self.keys) + edges
        self.scores = np.zeros(self.size)
        self.scores[: len(self.keys)] = [self._score(n, p) for n, p in self.keys]
        self.limits = limits(sensitivity, self.keys, target, profile)
        self.runs = run_as_integers(sensitivity, self.keys, target)
        self.budgets = constraints.budgets()
        for name in self.budgets:
            self.limit(name)
        self.equal, self.to = self._structure()

    def limit(self, name: str) -> Limit:
        """The limit of that name.

        Raises:
            PolicyError: what it is computed from is not there.
        """
        if name not in self.limits:
            raise PolicyError(f"{name} {_MISSING[name]}")
        return self.limits[name]

    def _score(self, name: str, pair: Widths) -> float:
        # A locked width that was not scored changes no decision.
        return sum(
            self.sensitivity.score(name, part, b)
            for part, b in zip(PARTS, pair, strict=True)
            if name not in self.locked or b in self.sensitivity.bits(part)
        )

    def _structure(self) -> tuple[csr_array, Vector]:
        """One candidate per layer, and agreement within groups."""
        places = places_of(self.keys)
        entries = [(1.0, row, i) for row, name in enumerate(self.layers) for i in places[name]]
        right = [1.0] * len(self.layers)
        for first, *others in self.sensitivity.groups:
            for other in others:
                both = [(1.0, i) for i in places[first]] + [(-1.0, i) for i in places[other]]
                for bits in {self.keys[i][1][1] for _, i in both}:
                    row = len(right)
                    entries += [(s, row, i) for s, i in both if self.keys[i][1][1] == bits]
                    right.append(0.0)
        return sparse(entries, (len(right), self.size)), np.array(right)

    def program(self, objective: Vector, names: Sequence[str]) -> Program:
        """The program with the budgets of that name in force."""
        rows, limit = [csr_array((0, self.size))], [np.zeros(0)]
        for name in names:
            one, budget = self.limits[name], self.budgets[name]
            # In units of the budget, because the solver's tolerance of 1e-6 is absolute.
            rows.append(one.rows * (1 / (budget * one.unit)))
            limit.append(1.0 - one.fixed / (budget * one.unit))
        if self.profile:
            edges, right = conversions(self.keys, self.runs, self.profile)
            rows.append(edges)
            limit.append(right)
        integer = np.arange(self.size) < len(self.keys)
        return Program(
            objective=objective,
            equal=self.equal,
            to=self.to,
            less=vstack(rows).tocsr(),
            limit=np.concatenate(limit),
            upper=np.ones(self.size),
            integer=integer,
        )

    def best(self, program: Program) -> tuple[dict[str, Widths], float] | None:
        """The configuration that solves a program within the budgets, and its gap."""
        for _ in range(MAX_CUTS):
            found = solve(program)
            if found is None:
                return None
            widths = self.widths(found.z)
            if self.meets(widths):
                return widths, found.gap
            # Over budget by less than the solver's tolerance: forbid this one and go on.
            row = np.where(program.integer, found.z, 0.0)
            program = program.with_rows(csr_array(row[None]), np.array([row.sum() - 1]))
        return None

    def widths(self, z: Vector) -> dict[str, Widths]:
        """The configuration that a vector stands for."""
        return {n: pair for (n, pair), x in zip(self.keys, z, strict=False) if x > 0.5}

    def meets(self, widths: Mapping[str, Widths]) -> bool:
        """Whether a configuration is within all budgets."""
        return all(
            self.limits[name].measure(widths) <= budget * (1 + 1e-12)
            for name, budget in self.budgets.items()
        )

    # -- what is achievable --------------------------------------------------------------------

    def range_of(self, name: str, others: Sequence[str] | None = None) -> tuple[float, float]:
        """Least and greatest value of one limit, with the other budgets in force.

        Raises:
            InfeasibleError: the other budgets cannot be met.
        """
        if others is None:
            others = [n for n in self.budgets if n != name]
        low, high = self._least(name, others), self._greatest(name, others)
        if low is None or high is None:
            raise self.infeasible()
        return low, high

    def _least(self, name: str, others: Sequence[str]) -> float | None:
        """The least value: of the largest row, by a variable that no row may exceed."""
        limit = self.limit(name)
        if len(limit.fixed) == 1:
            found = solve(self.program(limit.rows.toarray()[0], others))
            return None if found is None else limit.measure(self.widths(found.z))
        program = self.program(np.zeros(self.size), others)
        scale = 1 / max(float(abs(limit.rows).max()), 1.0)
        peak = csr_array(np.full((len(limit.fixed), 1), -1.0))
        wider = Program(
            objective=np.append(program.objective, 1.0),
            equal=_pad(program.equal),
            to=program.to,
            less=vstack([_pad(program.less), hstack([limit.rows * scale, peak])]).tocsr(),
            limit=np.append(program.limit, -limit.fixed * scale),
            upper=np.append(program.upper, np.inf),
            integer=np.append(program.integer, False),
        )
        found = solve(wider)
        return None if found is None else limit.measure(self.widths(found.z))

    def _greatest(self, name: str, others: Sequence[str]) -> float | None:
        """The greatest value of any row."""
        limit = self.limit(name)
        rows = limit.rows.toarray()
        if len(rows) > 1:  # the row that is largest where every layer is as wide as it may be
            tops = [rows[:, i].max(axis=1) for i in places_of(self.keys).values()]
            rows = rows[[int(np.argmax(np.sum(tops, axis=0) + limit.fixed))]]
        found = solve(self.program(-rows[0], others))
        return None if found is None else limit.measure(self.widths(found.z))

    def infeasible(self) -> InfeasibleError:
        """Why there is no configuration: the achievable range of every budget."""
        if solve(self.program(self.scores, [])) is None:
            return InfeasibleError(
                "the widths of the layers contradict each other before any budget: a locked layer "
                "and another that reads the same tensor must agree on its activation width. "
                f"Groups: {[list(g) for g in self.sensitivity.groups]}; locked: {self.locked}."
            )
        parts = []
        for name, budget in self.budgets.items():
            others = [n for n in self.budgets if n != name]
            where = f" (with {', '.join(others)} in force)" if others else ""
            low, high = self._least(name, others), self._greatest(name, others)
            if low is None or high is None:  # the others are too tight: what it could be alone
                (low, high), where = self.range_of(name, []), " (alone)"
            parts.append(f"{name} must be in {low:.6g}..{high:.6g}{where}, got {budget:g}")
        widths = ", ".join(f"W{w or 32}A{a or 32}" for w, a in self.pairs)
        return InfeasibleError(
            f"no choice among {widths} meets the budget: {'; '.join(parts)}. "
            "Raise it, allow narrower widths with --bits and --act-bits, or unlock layers."
        )


def _pad(rows: csr_array) -> csr_array:
    """A column of zeros for the variable of the peak."""
    return hstack([rows, csr_array((rows.shape[0], 1))]).tocsr()
