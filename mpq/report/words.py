"""What is said of an accuracy: with its interval, beside float's on the same images, and of which.

Two figures that differ by less than chance explains are never told apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from mpq.diagnose.facts import NATS, score_unit
from mpq.noise import EXACT_DB, interval, margin

DISTILLED = ", distilled"
NOWHERE = "no images were held out to measure on"


def top1_text(top1: float, count: int) -> str:
    """An accuracy with its 95 % interval: `92.30 % (95 %: 91.8 to 92.8)`."""
    low, high = interval(top1, count)
    return f"{top1:.2f} % (95 %: {low:.1f} to {high:.1f})"


def decibels(value: float | None, unit: str = "") -> str:
    """A distance in dB: `61.3`, `exact` where nothing differs, `-` for None."""
    return "-" if value is None else "exact" if value >= EXACT_DB else f"{value:.1f}{unit}"


def difference(after: float, before: float, count: int) -> str:
    """What two accuracies of the same images differ by, in points of top-1, or that they do not.

    Args:
        after: percent, what is judged.
        before: percent, what it is held against.
        count: of images.
    """
    noise, points = margin(after, before, count), f"{after - before:+.2f} points of top-1"
    if abs(after - before) <= noise:
        return f"no difference beyond chance ({points}, chance {noise:.2f})"
    return f"{points}, of which chance explains {noise:.2f}"


def measured(metrics: Mapping[str, Any]) -> list[str]:
    """The accuracy of a quantized network beside float's, in lines (`metrics` of its file)."""
    if "metric" in metrics:
        return [_judged(metrics)]
    top1, count = metrics.get("validation_top1"), metrics.get("validation_images")
    if top1 is None:
        return [NOWHERE]
    plain = metrics.get("float_top1")
    if plain is None or not count:
        return [f"top-1 {top1:.2f} %, simulated"]
    told = [
        f"top-1 {top1_text(top1, count)}, float {plain:.2f} %, on {count:,} held-out images",
        f"simulated; {difference(top1, plain, count)}",
    ]
    if metrics.get("validation_seen"):
        told.append("held out of the training images: this network may have been trained on them")
    return told


def _judged(metrics: Mapping[str, Any]) -> str:
    """The metric that was asked for."""
    said = f"{metrics['metric']} {metrics['value']:.4g} on held-out batches, simulated"
    if (lost := metrics.get("lost")) is not None:
        said += (
            f"; {metrics['float_value']:.4g} before: lost {lost['value']:.3g} "
            f"(95 %: {lost['low']:.3g} to {lost['high']:.3g})"
        )
    return said


def chance(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far a figure may be off by chance, and whether any differs from float's by more."""
    known = [row for row in rows if row["top1"] is not None]
    low, high = interval(known[0]["top1"], known[0]["n"])
    told = f"95 % within {(high - low) / 2:.2f} points"
    plain = next((row for row in known if row["file"].endswith("float.onnx")), None)
    others = [row for row in known if row is not plain]
    if plain is None or not others:
        return told
    apart = [
        PurePath(row["file"]).name
        for row in others
        if abs(row["top1"] - plain["top1"]) > margin(row["top1"], plain["top1"], row["n"])
    ]
    if apart:
        return f"{told}; beyond chance from float: {', '.join(apart)}"
    return f"{told}; none differs from float's beyond chance"


def distilled(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whether distillation brought more than chance explains, in any configuration."""
    plain = {row["name"]: row for row in rows}
    pairs = [
        (row, plain[row["name"].removesuffix(DISTILLED)])
        for row in rows
        if row["name"].endswith(DISTILLED)
    ]
    noise = max((margin(a["top1"], b["top1"], a["n"]) for a, b in pairs), default=0.0)
    better = [a["name"] for a, b in pairs if a["top1"] - b["top1"] > noise]
    if better:
        return f"distillation gains beyond chance ({noise:.1f} points) in {', '.join(better)}"
    return (
        f"no gain by distillation beyond chance, which explains {noise:.1f} points of a difference"
    )


def meaning(metric: str) -> str:
    """What such a number says.

    That a divergence of `d` nats moves a probability by `sqrt(d / 2)` at most, on average over the
    images, is Pinsker's inequality.
    """
    if metric == "loss":
        return "nats: how much the loss on the labels is predicted to grow"
    if metric in NATS:
        return (
            "nats: predicted divergence of the answers from float's, mean of an image; 0.02 moves "
            "the probability of a class by 10 points at most"
        )
    return f"{score_unit(metric)}: it orders layers and policies, and has no meaning by itself"
