"""Sensitivity and search: which layer can take how few bits.

- `sensitivity`: the scores as a value and a file; `cost`: bits, bytes, BitOps, activation memory
- `score`: `score_layers`, the way in; `perturb`, `watch`: the candidates, and a look at tensors
- `fisher`, `single`, `traces`: the metrics that look at images, in `batches`
- `search`: widths for a budget; `limits`, `problem`, `solver`: as a 0/1 program; `drop`: accuracy
- `explain`: from its answer to a policy file; `validate`: scores against measured configurations
"""

from __future__ import annotations

from mpq.analyze.cost import Allocation
from mpq.analyze.drop import Measured
from mpq.analyze.explain import build_policy, locked_widths
from mpq.analyze.score import METRICS, Scoring, score_layers
from mpq.analyze.search import Search, allocate, candidates
from mpq.analyze.sensitivity import Row, Sensitivity
from mpq.verb import callable_package

__all__ = [
    "METRICS",
    "Allocation",
    "Measured",
    "Row",
    "Scoring",
    "Search",
    "Sensitivity",
    "allocate",
    "build_policy",
    "candidates",
    "locked_widths",
    "score_layers",
]
callable_package(__name__)
