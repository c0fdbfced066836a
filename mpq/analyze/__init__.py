"""Sensitivity and search: which layer can take how few bits.

- `sensitivity`: the scores as a value and a file; `cost`: bits, bytes, BitOps, activation memory
- `score`: `score_layers`, the way in; `perturb`, `watch`: the candidates, and a look at tensors
- `fisher`, `single`, `traces`: the metrics that look at images, in `batches`
- `search`: widths for a budget; `limits`, `problem`, `solver`: as a 0/1 program; `drop`: accuracy
- `explain`: from its answer to a policy file; `compare`: what two policies differ in
"""

from __future__ import annotations

from mpq.analyze.drop import Measured, least_cost
from mpq.analyze.explain import build_policy, locked_widths
from mpq.analyze.score import METRICS, score_layers
from mpq.analyze.search import (
    Allocation,
    allocate,
    candidates,
    limit_range,
    pareto_front,
)
from mpq.analyze.sensitivity import Row, Sensitivity

__all__ = [
    "METRICS",
    "Allocation",
    "Measured",
    "Row",
    "Sensitivity",
    "allocate",
    "build_policy",
    "candidates",
    "least_cost",
    "limit_range",
    "locked_widths",
    "pareto_front",
    "score_layers",
]
