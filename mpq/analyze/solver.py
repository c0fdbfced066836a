"""An exact 0/1 solver for programs with one choice per row: HiGHS on a proven core. No torch.

HiGHS (`scipy.optimize.milp`) alone takes seconds once there are thousands of variables. The linear
relaxation takes milliseconds, and its reduced costs say how much each variable would worsen the
bound if it were 1. So the program is solved over the variables of reduced cost up to `tau`; when
the answer is within `tau` of the bound, no variable that was left out can be part of a better one
and the answer is proved optimal; otherwise `tau` becomes that distance and the core grows (E. Balas
and E. Zemel, "An Algorithm for Large Zero-One Knapsack Problems", 1980).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, linprog, milp
from scipy.sparse import csr_array, vstack

from mpq.errors import PolicyError

Vector = NDArray[np.float64]
Flags = NDArray[np.bool_]

OBJECTIVE_SCALE = 1e4
"""HiGHS stops within 1e-6 of the best objective, absolutely: the largest score becomes this."""
SPARE = 60
"""Variables in the first core beyond one for each row."""
SECONDS = 30.0
"""For one core; what is found by then is given out with its gap."""
INFEASIBLE = (2, 4)
"""HiGHS: infeasible, and infeasible or unbounded."""


@dataclass(frozen=True)
class Program:
    """Minimise `objective @ z` with `equal @ z = to`, `less @ z <= 1 * limit`, `0 <= z <= upper`.

    Args:
        objective: `[n]`.
        equal: `[m, n]`, with `to` `[m]`.
        less: `[k, n]`, with `limit` `[k]`; rows are scaled so that limits are of order 1, because
            the tolerance of the solver is absolute.
        upper: `[n]`, infinity allowed.
        integer: `[n]`, which variables are 0 or 1.
    """

    objective: Vector
    equal: csr_array
    to: Vector
    less: csr_array
    limit: Vector
    upper: Vector
    integer: Flags

    def with_rows(self, less: csr_array, limit: Vector) -> Program:
        """The program with further upper limits."""
        return replace(
            self, less=vstack([self.less, less]).tocsr(), limit=np.append(self.limit, limit)
        )


@dataclass(frozen=True, slots=True)
class Solution:
    """The best vector, 0/1 where it must be, and the relative distance to the proved bound."""

    z: Vector
    gap: float


def solve(program: Program) -> Solution | None:
    """The optimum; None if no vector meets the constraints.

    Raises:
        PolicyError: the solver gave up.
    """
    largest = float(np.abs(program.objective).max(initial=0.0))
    program = replace(program, objective=program.objective * (OBJECTIVE_SCALE / (largest or 1.0)))
    relaxed = _relax(program)
    if relaxed is None:
        return None
    bound, reduced = relaxed
    order = np.sort(reduced[program.integer])
    tau = float(order[min(len(order) - 1, len(program.to) + SPARE)])
    while True:
        core = ~program.integer | (reduced <= tau + 1e-9)
        found = _search(program, core)
        whole = bool(core.all())
        if found is None:
            if whole:
                return None
            tau = max(8 * tau, float(order[min(2 * int(core.sum()), len(order) - 1)]))
            continue
        z, value, stopped = found
        if value - bound <= tau or whole or stopped:
            break
        tau = value - bound
    return Solution(z, max(value - bound, 0.0) / max(abs(value), 1e-300) if stopped else 0.0)


def _relax(program: Program) -> tuple[float, Vector] | None:
    """Bound and reduced costs of the linear relaxation; None if it has no solution."""
    result: OptimizeResult = linprog(
        program.objective,
        A_ub=program.less,
        b_ub=program.limit,
        A_eq=program.equal,
        b_eq=program.to,
        bounds=np.column_stack([np.zeros(len(program.upper)), program.upper]),
        method="highs",
    )
    if result.status in INFEASIBLE:
        return None
    if result.status != 0:
        raise PolicyError(f"the solver stopped without an answer: {result.message}")
    return float(result.fun), np.asarray(result.lower.marginals, dtype=np.float64)


def _search(program: Program, core: Flags) -> tuple[Vector, float, bool] | None:
    """Best vector among those that are 0 outside of `core`, its value, whether time ran out."""
    picked = np.flatnonzero(core)
    with _without_debris():
        result: OptimizeResult = milp(
            program.objective[picked],
            integrality=program.integer[picked].astype(float),
            bounds=Bounds(0, program.upper[picked]),
            constraints=[
                LinearConstraint(program.equal[:, picked], program.to, program.to),
                LinearConstraint(program.less[:, picked], -np.inf, program.limit),
            ],
            # Without presolve: mapping a solution back, HiGHS 1.12 may write to the C stdout.
            options={"mip_rel_gap": 0.0, "presolve": False, "time_limit": SECONDS},
        )
    if result.x is None:
        if result.status in INFEASIBLE:
            return None
        raise PolicyError(f"the solver stopped without an answer: {result.message}")
    z = np.zeros(len(core))
    z[picked] = result.x
    z[program.integer] = np.round(z[program.integer])
    return z, float(result.fun), result.status == 1


@contextmanager
def _without_debris() -> Iterator[None]:
    """HiGHS 1.12 leaves lines of debugging on the C stdout, where a result may be read from.

    What anybody else writes there meanwhile is passed on.
    """
    try:
        kept = os.dup(1)
    except OSError:  # a process without one: nothing can be read from it either
        yield
        return
    if sys.stdout is not None:
        sys.stdout.flush()
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not line.startswith(b"Highs"):
                    os.write(1, line)
