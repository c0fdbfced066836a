"""Measured refinement of what the search found for each budget.

Configurations are quantized as `mpq ptq` does and their answers compared with the float network's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.analyze.refine import Refined, refine
from mpq.analyze.search import Allocation
from mpq.analyze.sensitivity import Sensitivity
from mpq.data import Normalization, sample_indices
from mpq.errors import DataError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.pipeline.dropping import CALIBRATION_IMAGES, quantized
from mpq.pipeline.subject import Subject
from mpq.policy import Constraints
from mpq.ptq import Effort
from mpq.train.evaluate import Images, predict

logger = logging.getLogger(__name__)
COMPARED_IMAGES = 1000
"""In each half: the one that chooses, and the one that judges the choice."""
LEAST_IMAGES = 20
Solve = Callable[[Sensitivity, Constraints], Allocation]


def check_refine(count: int, budgets: Sequence[Constraints], subject: Subject) -> None:
    """Refuse what cannot be refined before any work is done for it.

    Raises:
        DataError: there are no data.
        UsageError: a budget asks for an accuracy, which is measured already.
    """
    if not count:
        return
    subject.require_data("--refine")
    if any(c.max_drop is not None for c in budgets):
        raise UsageError(
            "--refine must go with budgets of bits, bytes, operations or time. Got --max-drop, "
            "which measures already. Leave one of them out."
        )


def refine_budgets(
    meter: DivergenceMeter,
    scores: Sensitivity,
    solve: Solve,
    budgets: Sequence[Constraints],
    *,
    count: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[Refined]:
    """Measure `count` configurations for each budget and choose among them.

    Args:
        meter: what measures.
        scores: where each budget begins.
        solve: the best configuration of a budget by such scores.
        budgets: each is refined for itself.
        count: configurations of a budget.
        seed: of the draws.
        progress: told (measured, all).
    """
    found: list[Refined] = []
    for place, budget in enumerate(budgets):

        def best(changed: Sensitivity, budget: Constraints = budget) -> Allocation:
            return solve(changed, budget)

        def tell(done: int, total: int, place: int = place) -> None:
            progress(place * total + done, len(budgets) * total)

        found.append(
            refine(scores, best, meter.losses, meter.again, count=count, seed=seed, told=tell)
        )
    return found


class DivergenceMeter:
    """Quantizes configurations as `mpq ptq` does and compares their answers with the float ones.

    No label is used. Quantization sees the same calibration images each time, so that what tells
    configurations apart is their widths.

    Args:
        graph: a network in stage `float`.
        normalize: of its images.
        images: uint8 `[n, H, W, 3]`, to choose on; and others, to measure the choice again.
        calibrations: normalized images to quantize with, for the one and for the other.
        effort: of quantization.
    """

    def __init__(
        self,
        graph: QuantGraph,
        normalize: Normalization,
        *,
        images: Sequence[Images],
        calibrations: Sequence[Tensor],
        effort: Effort = "good",
    ) -> None:
        self.graph, self.normalize, self.effort = graph, normalize, effort
        self.images, self.calibrations = images, calibrations
        self.references = [log_probabilities(graph.module, part, normalize) for part in images]

    def losses(self, allocation: Allocation) -> NDArray[np.float64]:
        """`KL(float || quantized)` of each image to choose on `[N]`, in nats."""
        return self._measure(allocation, 0)

    def again(self, allocation: Allocation) -> NDArray[np.float64]:
        """The same on the other images, quantized with other calibration images."""
        return self._measure(allocation, 1)

    def _measure(self, allocation: Allocation, part: int) -> NDArray[np.float64]:
        module = quantized(
            self.graph, allocation.widths, self.calibrations[part], effort=self.effort
        )
        found = log_probabilities(module, self.images[part], self.normalize)
        rows = divergences(self.references[part], found)
        logger.info("%.2f effective bits: %.3g nats", allocation.effective_bits, rows.mean())
        return rows


def validation_meter(subject: Subject, graph: QuantGraph, *, seed: int = 0) -> DivergenceMeter:
    """A meter on halves of the validation split, or of the training split where there is none.

    Raises:
        DataError: there are no data, or fewer than `LEAST_IMAGES` images to measure on.
    """
    data = subject.require_data("--refine")
    source = data.validation if len(data.validation) else data.train
    if len(source) < LEAST_IMAGES:
        raise DataError(
            f"--refine must have at least {LEAST_IMAGES} validation images to measure on. Got "
            f"{len(source)}. Leave it out, or give more images."
        )
    picked = sample_indices(source, 2 * COMPARED_IMAGES, seed)
    return DivergenceMeter(
        graph,
        subject.normalize,
        images=[source.read(picked[k::2]) for k in range(2)],
        calibrations=[subject.sample(CALIBRATION_IMAGES, seed + k, "--refine") for k in range(2)],
    )


def log_probabilities(module: nn.Module, images: Images, normalize: Normalization) -> Tensor:
    """Float64 `[n, C]`."""
    return predict(module, images, normalize).double().log_softmax(1)


def divergences(reference: Tensor, found: Tensor) -> NDArray[np.float64]:
    """`KL(reference || found)` of each image `[n]`, in nats, of log probabilities `[n, C]`."""
    rows: NDArray[np.float64] = (reference.exp() * (reference - found)).sum(1).numpy()
    return rows
