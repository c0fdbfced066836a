"""mpq: a mixed-precision quantization compiler for PyTorch vision models.

The public names below are imported on first use, so that `mpq --help`, `mpq bench` and whoever
only reads a policy never load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpq.analyze import Scoring, Search, build_policy, score_layers
    from mpq.graph.ir import QuantGraph
    from mpq.graph.norms import absorb_norms, attach_norms
    from mpq.graph.passes import freeze, prepare, to_float
    from mpq.policy import Constraints, LayerPolicy, Policy
    from mpq.ptq import calibrate, quantize_graph
    from mpq.rundir import Run
    from mpq.spec import QuantSpec
    from mpq.train.loop import fit
    from mpq.train.plan import TrainingData, TrainingPlan
    from mpq.train.recipe import Recipe
    from mpq.userimport import trusting

__version__ = "0.1.0"

_HOME = {
    "Constraints": "mpq.policy",
    "LayerPolicy": "mpq.policy",
    "Policy": "mpq.policy",
    "QuantGraph": "mpq.graph.ir",
    "QuantSpec": "mpq.spec",
    "Recipe": "mpq.train.recipe",
    "Run": "mpq.rundir",
    "Scoring": "mpq.analyze",
    "Search": "mpq.analyze",
    "TrainingData": "mpq.train.plan",
    "TrainingPlan": "mpq.train.plan",
    "absorb_norms": "mpq.graph.norms",
    "attach_norms": "mpq.graph.norms",
    "build_policy": "mpq.analyze",
    "calibrate": "mpq.ptq",
    "fit": "mpq.train.loop",
    "freeze": "mpq.graph.passes",
    "prepare": "mpq.graph.passes",
    "quantize_graph": "mpq.ptq",
    "score_layers": "mpq.analyze",
    "to_float": "mpq.graph.passes",
    "trusting": "mpq.userimport",
}
__all__ = [
    "Constraints",
    "LayerPolicy",
    "Policy",
    "QuantGraph",
    "QuantSpec",
    "Recipe",
    "Run",
    "Scoring",
    "Search",
    "TrainingData",
    "TrainingPlan",
    "absorb_norms",
    "attach_norms",
    "build_policy",
    "calibrate",
    "fit",
    "freeze",
    "prepare",
    "quantize_graph",
    "score_layers",
    "to_float",
    "trusting",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home."""
    if name not in _HOME:
        raise AttributeError(f"module 'mpq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
