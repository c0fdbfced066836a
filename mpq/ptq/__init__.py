"""Post-training quantization: ranges, then weights and biases, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.ptq.blockwise import BlockLearner
from mpq.ptq.equalize import EQUALIZE, Equalize, Pair, equalize
from mpq.ptq.learn import Learning
from mpq.ptq.observe import METHODS, Method, calibrate
from mpq.ptq.sequential import MEMORY_MB, batch_size, quantize_layers

__all__ = [
    "EFFORTS",
    "EQUALIZE",
    "MEMORY_MB",
    "METHODS",
    "Effort",
    "Equalize",
    "Learning",
    "Method",
    "Pair",
    "calibrate",
    "equalize",
    "quantize_graph",
    "quantize_layers",
]

Effort = Literal["fast", "good", "best"]
EFFORTS: tuple[str, ...] = get_args(Effort)


def quantize_graph(
    qg: QuantGraph,
    images: Tensor,
    *,
    method: Method = "mse",
    effort: Effort = "good",
    batch: int | None = None,
    learning: Learning | None = None,
    state: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    resume: bool = False,
    memory_mb: float = MEMORY_MB,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuantGraph:
    """Quantize a prepared graph without training, in place.

    Args:
        qg: a graph in stage `prepared`.
        images: normalized calibration images `[N, C, H, W]`.
        method: how activation ranges are chosen.
        effort: `fast` sets ranges, rounds to nearest and corrects biases; `good` rounds layer after
            layer with error feedback; `best` then learns the rounding, activation steps and biases
            of each block of layers.
        batch: images at a time; by default as many as keep the largest activation small.
        learning: how `best` learns.
        state: file in which `best` writes down its finished blocks.
        identity: what must be equal for `resume`, beside the settings of `learning`.
        resume: take over the finished blocks of `state`.
        memory_mb: activations of all images that are held in memory, in MiB; the rest lies in
            temporary files.
        progress: told (phase, done, all).

    Returns:
        The same graph.

    Raises:
        UsageError: an unknown method or effort, no images, or a `state` of another run.
        GraphError: the graph is not prepared, or an activation is not finite.
    """
    if effort not in EFFORTS:
        raise UsageError(f"effort must be one of {', '.join(EFFORTS)}. Got {effort!r} instead.")

    def tell(phase: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(phase, done, total)

    learner = None
    if effort == "best":
        learner = BlockLearner(
            learning or Learning(),
            path=state,
            identity=identity,
            resume=resume,
            progress=tell("learned rounding"),
        )
    batch = batch or batch_size(qg)
    calibrate(qg, images, method=method, batch=batch, progress=tell("ranges"))
    quantize_layers(
        qg,
        images,
        batch=batch,
        learn_rounding=effort != "fast",
        learner=learner,
        memory_mb=memory_mb,
        progress=tell("layers"),
    )
    return qg
