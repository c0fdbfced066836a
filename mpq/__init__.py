"""mpq: a mixed-precision quantization compiler for PyTorch vision models.

The verbs `analyze`, `ptq`, `qat`, `export`, `bench`, `certify`, `verify`, `diagnose` and `report`
do what the commands of these names do (`mpq.api`); the other names are their parts.

The public names below are imported on first use, so that `mpq --help`, `mpq bench` and whoever
only reads a policy never load torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpq.analyze import Scoring, Search, allocate, build_policy, score_layers
    from mpq.api import analyze, bench, certify, diagnose, export, ptq, qat, report, verify
    from mpq.export.certify import Certificate
    from mpq.export.onnx_file import ExportResult
    from mpq.graph.ir import QuantGraph
    from mpq.graph.norms import absorb_norms, attach_norms
    from mpq.graph.passes import freeze, prepare, to_float
    from mpq.pipeline.analysis import Analysis
    from mpq.pipeline.benching import Bench
    from mpq.pipeline.quantizing import Quantized
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
    "Analysis": "mpq.pipeline.analysis",
    "Bench": "mpq.pipeline.benching",
    "Certificate": "mpq.export.certify",
    "Constraints": "mpq.policy",
    "ExportResult": "mpq.export.onnx_file",
    "LayerPolicy": "mpq.policy",
    "Policy": "mpq.policy",
    "QuantGraph": "mpq.graph.ir",
    "QuantSpec": "mpq.spec",
    "Quantized": "mpq.pipeline.quantizing",
    "Recipe": "mpq.train.recipe",
    "Run": "mpq.rundir",
    "Scoring": "mpq.analyze",
    "Search": "mpq.analyze",
    "TrainingData": "mpq.train.plan",
    "TrainingPlan": "mpq.train.plan",
    "absorb_norms": "mpq.graph.norms",
    "allocate": "mpq.analyze",
    "attach_norms": "mpq.graph.norms",
    "bench": "mpq.api",
    "build_policy": "mpq.analyze",
    "calibrate": "mpq.ptq",
    "certify": "mpq.api",
    "fit": "mpq.train.loop",
    "freeze": "mpq.graph.passes",
    "prepare": "mpq.graph.passes",
    "qat": "mpq.api",
    "quantize_graph": "mpq.ptq",
    "score_layers": "mpq.analyze",
    "to_float": "mpq.graph.passes",
    "trusting": "mpq.userimport",
    "verify": "mpq.api",
}
_PACKAGES = ("analyze", "diagnose", "export", "ptq", "report")
"""Verbs that are packages with parts, too (`mpq.verb`)."""
__all__ = [
    "Analysis",
    "Bench",
    "Certificate",
    "Constraints",
    "ExportResult",
    "LayerPolicy",
    "Policy",
    "QuantGraph",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Run",
    "Scoring",
    "Search",
    "TrainingData",
    "TrainingPlan",
    "__version__",
    "absorb_norms",
    "allocate",
    "analyze",
    "attach_norms",
    "bench",
    "build_policy",
    "calibrate",
    "certify",
    "diagnose",
    "export",
    "fit",
    "freeze",
    "prepare",
    "ptq",
    "qat",
    "quantize_graph",
    "report",
    "score_layers",
    "to_float",
    "trusting",
    "verify",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home."""
    if name in _PACKAGES:
        return import_module(f"mpq.{name}")
    if name == "allocate":
        return _allocate
    if name not in _HOME:
        raise AttributeError(f"module 'mpq' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)


def _allocate(scores: Any, constraints: Any) -> Any:
    """`mpq.allocate` of 0.1.0."""
    now = "mpq.Search(scores).allocate(constraints)"
    warnings.warn(f"mpq.allocate goes in 0.3: use {now}", DeprecationWarning, stacklevel=2)
    return import_module("mpq.analyze").Search(scores).allocate(constraints)
