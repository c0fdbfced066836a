"""Sensitivity and search: which layer can take how few bits.

- `sensitivity`: the scores as a value and a file; `cost`: bits, bytes, BitOps
- `score`: `score_layers`, the way in; `perturb`, `watch`: the candidates, and a look at tensors
- `fisher`, `kl`: the metrics that look at images
- `search`: the 0/1 program; `explain`: from its answer to a policy file
"""

from __future__ import annotations

from mpq.analyze.explain import build_policy, locked_widths
from mpq.analyze.score import METRICS, score_layers
from mpq.analyze.search import Allocation, allocate, candidates, pareto_front
from mpq.analyze.sensitivity import Row, Sensitivity

__all__ = [
    "METRICS",
    "Allocation",
    "Row",
    "Sensitivity",
    "allocate",
    "build_policy",
    "candidates",
    "locked_widths",
    "pareto_front",
    "score_layers",
]
