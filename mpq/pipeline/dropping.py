"""What configurations lose by top-1 or another metric, for a search that aims at that."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import nn

from mpq.analyze.cost import Allocation
from mpq.analyze.explain import allocation_policy
from mpq.calls import Inputs
from mpq.data import sample_indices
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare
from mpq.layers import Widths
from mpq.pipeline.evaluating import evaluation
from mpq.pipeline.subject import Subject
from mpq.ptq import Effort, quantize_graph

logger = logging.getLogger(__name__)
CALIBRATION_IMAGES = 256
MEASURED_IMAGES = 2000


class DropMeter:
    """Quantizes configurations as `mpq ptq` does and measures what they lose on held-out images.

    Images are of the validation split, or of the training split where the data have none. A network
    that was trained on them loses less there than on new images.

    Args:
        subject: the network and its data; its metric, or top-1.
        graph: its graph in stage `float`.
        relative: give drops in percent of the float network's figure rather than in points.

    Raises:
        DataError: there are no data.
    """

    def __init__(self, subject: Subject, graph: QuantGraph, *, relative: bool = False) -> None:
        data = subject.require_data("--max-drop")
        self.subject, self.graph, self.relative = subject, graph, relative
        self.calibration = subject.sample(CALIBRATION_IMAGES, 0, "--max-drop")
        self.intervals: dict[int, tuple[float, float]] = {}
        self.judged = evaluation(subject, graph.outputs, MEASURED_IMAGES)
        if self.judged is not None:
            self.before = self.judged.parts(subject.module)
            self.right = self.judged.metric.value(self.before)
            return
        source = data.validation if len(data.validation) else data.train
        picked = sample_indices(source, MEASURED_IMAGES, 0)
        self.images, self.labels = subject.read(source, picked)
        self.right = subject.top1(subject.module, self.images, self.labels)

    def drop(self, allocation: Allocation) -> float:
        """What a configuration loses, in the metric's unit or percent; negative where it gains."""
        module = quantized(self.graph, allocation.widths, self.calibration)
        if self.judged is None:
            found = self.subject.top1(module, self.images, self.labels)
            logger.info("%.2f effective bits: top-1 %.2f", allocation.effective_bits, found)
            return self._scaled(self.right - found)
        lost, name = (
            self.judged.lost(self.before, self.judged.parts(module)),
            self.judged.metric.name,
        )
        self.intervals[id(allocation)] = self._scaled(lost.low), self._scaled(lost.high)
        logger.info(
            "%.2f effective bits: %s loses %.4g", allocation.effective_bits, name, lost.value
        )
        return self._scaled(lost.value)

    def _scaled(self, lost: float) -> float:
        return 100 * lost / max(abs(self.right), 1e-9) if self.relative else lost


def quantized(
    graph: QuantGraph, widths: Mapping[str, Widths], images: Inputs, *, effort: Effort = "good"
) -> nn.Module:
    """A configuration of a graph in stage `float`, quantized as `mpq ptq` does.

    Args:
        graph: stays as it is.
        widths: of weights and input activations of each layer.
        images: normalized calibration images `[N, C, H, W]`, or inputs.
        effort: as `mpq.ptq.quantize_graph` takes it.
    """
    prepared = prepare(graph, allocation_policy(widths))
    quantize_graph(prepared, images, effort=effort)
    return prepared.module
