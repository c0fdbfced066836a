"""What a quantized network is worth: its accuracy beside float's, on the same images."""

from __future__ import annotations

from typing import Any

from mpq.data import sample_indices
from mpq.data.dataset import Labels, Samples, length
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import classifier
from mpq.noise import interval
from mpq.pipeline.subject import Subject

VALIDATION_IMAGES = 500


def after_training(top1: float | None, graph: QuantGraph, subject: Subject) -> dict[str, Any]:
    """`beside_float` on all held-out images; `top1_of` of floats, which training does not judge."""
    held = None if top1 is None else subject.held_out()
    if held is not None:
        return beside_float(top1, subject, *held)
    return {"validation_top1": None} if subject.data is None else top1_of(graph, subject)


def top1_of(graph: QuantGraph, subject: Subject) -> dict[str, Any]:
    """Top-1 in percent of the simulation and of float on validation images; None without any."""
    validation = subject.require_data("validation").validation
    if not len(validation) or not classifier(graph.outputs):
        return {"validation_top1": None}
    picked = sample_indices(validation, VALIDATION_IMAGES, 0)
    images, labels = subject.read(validation, picked)
    top1 = subject.top1(graph.module, images, labels)
    return beside_float(top1, subject, images, labels)


def beside_float(
    top1: float | None, subject: Subject, images: Samples, labels: Labels
) -> dict[str, Any]:
    """An accuracy in percent, and that of the float network on the same images."""
    count = length(images)
    return {
        "validation_top1": top1,
        "float_top1": subject.top1(subject.module, images, labels),
        "validation_images": count,
        "validation_interval": None if top1 is None else list(interval(top1, count)),
        "validation_seen": subject.seen,
    }
