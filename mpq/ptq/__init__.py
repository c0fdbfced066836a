"""Post-training quantization: ranges, then weights and biases, layer after layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from mpq.calls import Inputs, count, leaves, take
from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.ptq.blockwise import BlockLearner, FinishedBlocks
from mpq.ptq.equalize import EQUALIZE, Equalize, Pair, equalize
from mpq.ptq.learn import Learning
from mpq.ptq.observe import METHODS, Method, all_at_nodes, calibrate
from mpq.ptq.sequential import MEMORY_MB, quantize_layers
from mpq.rundir import Progress, silent
from mpq.verb import callable_package
from mpq.wide import Int16Form

__all__ = [
    "EFFORTS",
    "EQUALIZE",
    "MEMORY_MB",
    "METHODS",
    "Effort",
    "Equalize",
    "FinishedBlocks",
    "Learning",
    "Method",
    "Pair",
    "PtqSettings",
    "calibrate",
    "equalize",
    "looked_at",
    "quantize_graph",
    "quantize_layers",
]
callable_package(__name__)

FAST_VALUES = 5_000_000
"""Values of the inputs that effort `fast` looks at, at most: 33 images of 3x224x224."""

Effort = Literal["fast", "good", "best"]
EFFORTS: tuple[str, ...] = get_args(Effort)


@dataclass(frozen=True)
class PtqSettings:
    """How a network is quantized without training.

    Args:
        method: how activation ranges are chosen.
        effort: see `quantize_graph`.
        equalization: whether channels are rescaled between layers; see `equalize`.
        learning: how effort `best` learns.
        memory_mb: activations held in memory, in MiB.
        dynamic: linear layers that read floats take their range at run time
            (`mpq.graph.annotate.make_dynamic`); the policy of the result says which.
        int16_form: of all 16-bit activations (`mpq.wide`); None: as the policy says.
    """

    method: Method = "mse"
    effort: Effort = "good"
    equalization: Equalize = "auto"
    learning: Learning = field(default_factory=Learning)
    memory_mb: float = MEMORY_MB
    dynamic: bool = False
    int16_form: Int16Form | None = None


def quantize_graph(
    qg: QuantGraph,
    images: Inputs,
    *,
    method: Method = "mse",
    effort: Effort = "good",
    learning: Learning | None = None,
    finished: FinishedBlocks | None = None,
    memory_mb: float = MEMORY_MB,
    progress: Progress = silent,
) -> QuantGraph:
    """Quantize a prepared graph without training, in place.

    Args:
        qg: a graph in stage `prepared`.
        images: normalized calibration images `[N, C, H, W]`; for other networks a tuple or dict of
            inputs (`mpq.calls`), float ones normalized.
        method: how activation ranges are chosen.
        effort: `fast` sets ranges, rounds to nearest and corrects biases, by at most `FAST_VALUES`
            of the inputs; `good` rounds layer after layer with error feedback;
            `best` then learns the rounding, activation steps and biases of each block of layers.
        learning: how `best` learns.
        finished: where `best` writes down its finished blocks; None keeps them nowhere.
        memory_mb: activations of all images that are held in memory, in MiB; the rest lies in
            temporary files.
        progress: called with (phase, done, all).

    Returns:
        The same graph.

    Raises:
        UsageError: an unknown method or effort, no images, or finished blocks of another run.
        GraphError: the graph is not prepared, or an activation is not finite.
    """
    if effort not in EFFORTS:
        raise UsageError(f"effort must be one of {', '.join(EFFORTS)}. Got {effort!r} instead.")
    learner = None
    if effort == "best":
        learner = BlockLearner(
            learning or Learning(), finished, progress=partial(progress, "learned rounding")
        )
    images = looked_at(images, effort)
    walked = learner is None and all_at_nodes(qg.module)
    if not walked:
        calibrate(qg, images, method=method, batch=qg.batch(), progress=partial(progress, "ranges"))
    quantize_layers(
        qg,
        images,
        method=method if walked else None,
        learn_rounding=effort != "fast",
        learner=learner,
        memory_mb=memory_mb,
        progress=partial(progress, "layers"),
    )
    return qg


def looked_at(images: Inputs, effort: Effort) -> Inputs:
    """All samples, or for `fast` the first, no more than hold `FAST_VALUES`: few tell as much."""
    if effort != "fast":
        return images
    values = sum(tensor.numel() for tensor in leaves(images).values())
    few: Inputs = take(images, slice(max(1, FAST_VALUES * count(images) // values)))
    return few
