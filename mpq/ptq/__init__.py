"""Post-training quantization: ranges, then weights and biases, layer after layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

from torch import Tensor

from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.ptq.observe import METHODS, Method, calibrate
from mpq.ptq.sequential import quantize_layers

__all__ = [
    "EFFORTS",
    "METHODS",
    "Effort",
    "Method",
    "calibrate",
    "quantize_graph",
    "quantize_layers",
]

Effort = Literal["fast", "good"]
EFFORTS: tuple[str, ...] = get_args(Effort)


def quantize_graph(
    qg: QuantGraph,
    images: Tensor,
    *,
    method: Method = "mse",
    effort: Effort = "good",
    batch: int = 128,
    progress: Callable[[str, int, int], None] | None = None,
) -> QuantGraph:
    """Quantize a prepared graph without training, in place.

    Args:
        qg: a graph in stage `prepared`.
        images: normalized calibration images `[N, C, H, W]`.
        method: how activation ranges are chosen.
        effort: `fast` sets ranges and rounds to nearest; `good` also rounds sequentially with
            error feedback and corrects biases.
        batch: images at a time.
        progress: told (phase, done, all).

    Returns:
        The same graph.

    Raises:
        UsageError: an unknown method or effort, or no images.
        GraphError: the graph is not prepared, or an activation is not finite.
    """
    if effort not in EFFORTS:
        raise UsageError(f"effort must be one of {', '.join(EFFORTS)}. Got {effort!r} instead.")

    def tell(phase: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(phase, done, total)

    calibrate(qg, images, method=method, batch=batch, progress=tell("ranges"))
    good = effort == "good"
    quantize_layers(
        qg,
        images,
        batch=batch,
        learn_rounding=good,
        correct_bias=good,
        progress=tell("layers"),
    )
    return qg
