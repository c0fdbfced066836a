"""The metric that was asked for, made ready for a network and its held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.data import sample_indices
from mpq.data.dataset import Samples
from mpq.data.stream import view
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze
from mpq.outputs import Output
from mpq.pipeline.accuracies import VALIDATION_IMAGES, top1_of
from mpq.pipeline.measuring import Evaluation, Held, against, no_images
from mpq.pipeline.samples import ask
from mpq.pipeline.subject import Subject
from mpq.train.evaluate import evaluating


def evaluation(
    subject: Subject, outputs: Mapping[str, Output], count: int | None = None
) -> Evaluation | None:
    """How the answers of a subject's networks are judged; None where no metric was asked for.

    Args:
        subject: the float network, its data, and what is asked for.
        outputs: of its graph.
        count: held-out images at most, where there are no batches of the user's own; None: all.

    Raises:
        DataError: there are neither batches nor images.
    """
    judging = subject.judging
    if judging is None:
        return None
    batches = judging.batches
    if batches is None:
        batches = Held(*_held_out(subject, judging.metric.name, count), subject.tensor)

    def answer(inputs: Any) -> Any:
        with evaluating(subject.module):
            return ask(subject.module, inputs, subject.call)

    kinds = {name: output.kind for name, output in outputs.items()}
    return against(judging, batches, answer, kinds)


def _held_out(
    subject: Subject, metric: str, count: int | None
) -> tuple[Samples, NDArray[np.int64] | None]:
    """Validation images, or training images where there are none, and their class ids if any."""
    data = subject.data
    if data is None:
        raise no_images(metric)
    split = data.validation if len(data.validation) else data.compared
    picked = np.arange(len(split)) if count is None else sample_indices(split, count, 0)
    return view(split, picked), split.labels[picked] if data.labelled else None


def validate(graph: QuantGraph, subject: Subject) -> dict[str, Any]:
    """Figures of the simulation on validation images: top-1 in percent, and the metric asked for.

    Top-1 is None where there is none.
    """
    graph = freeze(graph)  # answers alike, and rounds its weights once, not for every batch
    judged = evaluation(subject, graph.outputs, VALIDATION_IMAGES)
    if judged is None:
        return top1_of(graph, subject)
    before, after = (judged.parts(network) for network in (subject.module, graph.module))
    lost, value = judged.lost(before, after), judged.metric.value
    return top1_of(graph, subject) | {
        "metric": judged.metric.name,
        "value": value(after),
        "float_value": value(before),
        "lost": asdict(lost),
    }
