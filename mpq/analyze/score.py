"""`score_layers`: score every candidate of a network by one of the metrics.

- `fisher`: Fisher quadratic form, one forward and one backward pass (the default)
- `gradient`: the same with the Fisher matrix taken as diagonal, as other tools have it
- `kl`: the true divergence, one candidate at a time
- `loss`: the true increase of the loss on the labels, one candidate at a time
- `fit`, `hawq`: the trace of the Fisher matrix or of the Hessian, times the noise
- `sqnr`: noise-to-signal power of the weights; needs no images
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from mpq.analyze.batches import Batches, Progress
from mpq.analyze.fisher import fisher_terms
from mpq.analyze.perturb import Column, Perturbations, Rounding, perturb
from mpq.analyze.sensitivity import Part, Row, Sensitivity
from mpq.analyze.single import single_scores
from mpq.analyze.traces import trace_scores
from mpq.calls import Inputs, count, leaves
from mpq.errors import DataError, UsageError, nearest
from mpq.graph.annotate import reading_groups
from mpq.graph.fingerprint import fingerprint
from mpq.graph.ir import QuantGraph
from mpq.graph.liveness import live_sets
from mpq.graph.outputs import stated
from mpq.spec import WIDTHS

Metric = Literal["fisher", "gradient", "kl", "loss", "fit", "hawq", "sqnr"]
METRICS: tuple[Metric, ...] = get_args(Metric)
LABELLED = ("loss", "fit", "hawq")
"""Metrics that look at the true labels."""
MAX_BATCH, PASS_BYTES, BYTES_PER_ELEMENT = 64, 400_000_000, 12
"""Images per pass; memory of a pass; what one output of a layer costs with what follows it."""
VERSION = 4
"""Part of the key: raise it when scoring or the file changes."""


@dataclass(frozen=True)
class Scoring:
    """How to score: all that the scores depend on besides the network and the images.

    Args:
        bits: weight widths; 16 brings 16-bit activations with it.
        act_bits: activation widths besides.
        metric: what is measured.
        seed: of the random draws.
        batch: images per pass; None: as many as fit into about 400 MB, 64 at most.
        rounding: how weights are rounded: `feedback` as `mpq ptq` does, or to the `nearest`.
        loss: of answer and batch, whose increase the scores predict, by metric fisher or gradient;
            None: the divergence from the network's own answers.

    Raises:
        UsageError: an unknown metric or width, or a metric that knows no loss.
    """

    bits: tuple[int, ...] = (8, 4)
    act_bits: tuple[int, ...] = (8,)
    metric: Metric = "fisher"
    seed: int = 0
    batch: int | None = None
    rounding: Rounding = "nearest"
    loss: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(
                f"the metric must be one of {', '.join(METRICS)}. Got {self.metric!r}"
                f"{nearest(self.metric, METRICS)}"
            )
        if self.loss is not None and self.metric not in ("fisher", "gradient"):
            raise UsageError(
                f"--loss goes with --metric fisher or gradient. Got {self.metric}, which does not "
                "look at it."
            )
        for name, widths in (("weight widths", self.bits), ("activation widths", self.act_bits)):
            if not widths or set(widths) - set(WIDTHS):
                known = " ".join(map(str, sorted(WIDTHS, reverse=True)))
                raise UsageError(f"{name} must be some of {known}. Got {list(widths)} instead.")

    @property
    def widths(self) -> dict[Part, list[int]]:
        """Widths to score, widest first."""
        wide = {16} & set(self.bits)
        return {
            "weight": sorted(set(self.bits), reverse=True),
            "activation": sorted({*self.act_bits, *wide}, reverse=True),
        }

    @property
    def described(self) -> str:
        """The metric, and the user's loss where there is one."""
        return self.metric if self.loss is None else f"{self.metric} of {self.loss.__name__}"

    def batch_for(self, qg: QuantGraph) -> int:
        """Images per pass: a backward pass keeps the outputs of all layers and what follows."""
        if self.batch is not None:
            return self.batch
        image = sum(layer.out_elements for layer in qg.layers.values()) * BYTES_PER_ELEMENT
        return max(1, min(MAX_BATCH, PASS_BYTES // image))

    def key(self, qg: QuantGraph, images: Inputs | None, labels: Any) -> str:
        """Hash of network, weights, images and settings: equal keys mean equal scores."""
        digest = hashlib.sha256(fingerprint(qg).encode())
        compared = self.loss is not None or self.metric in LABELLED
        for tensor in leaves((images, labels if compared else None)).values():
            if tensor is not None:
                digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        widths = sorted(self.bits), sorted(self.act_bits)
        settings = (*widths, self.metric, self.seed, self.batch_for(qg), self.rounding)
        digest.update(repr((VERSION, settings, list(qg.layers.values()))).encode())
        if self.loss is not None:
            digest.update(_code(self.loss).encode())
        if kinds := stated(qg.outputs):
            digest.update(repr(kinds).encode())
        return digest.hexdigest()


def _code(loss: Callable[..., Any]) -> str:
    """A loss with its code as far as it is known: scores of another one are not taken for its."""
    inner = inspect.unwrap(loss)
    try:
        return f"{loss.__name__} {inspect.getsource(inner)}"
    except (OSError, TypeError):
        return loss.__name__


def score_layers(
    qg: QuantGraph,
    images: Inputs | None,
    labels: Any = None,
    how: Scoring | None = None,
    *,
    key: str | None = None,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Score every layer at every width.

    Under `accelerate launch` each process scores its share of the images, and all get all scores.

    Args:
        qg: a graph in stage `float` (`mpq.graph.passes.to_float`); it is not changed.
        images: `[N, C, H, W]`, normalised as the network wants it, or inputs (`mpq.calls`); only
            `sqnr` can do without.
        labels: `[N]` class ids, for `loss`, `fit` and `hawq`; with a loss of the user's own the
            batch that it takes, of all images.
        how: metric, widths and all else; None: `Scoring()`.
        key: `how.key` of all these, where it is known already.
        partial: a file to keep what is done in, and to go on from (see `Batches`).
        progress: called with (done, total).

    Raises:
        DataError: no images or labels where the metric needs them, or NaN or infinity inside the
            network.
        GraphError: the network does not fit the metric.
    """
    how = how or Scoring()
    _check_images(how.metric, images, labels)
    size = how.batch_for(qg)
    columns: list[Column] = [
        (name, part, bits)
        for name in qg.layers
        for part, widths in how.widths.items()
        for bits in widths
    ]
    candidates = perturb(
        qg,
        images,
        weight_bits=how.widths["weight"],
        activation_bits=how.widths["activation"],
        rounding=how.rounding,
        batch=size,
    )
    batches = None if images is None else Batches(images, labels, size, partial, progress)
    scores = zip(columns, _score(candidates, columns, batches, how), strict=True)
    return Sensitivity(
        rows=tuple(Row(*c, score=s, sqnr=candidates.sqnr(c)) for c, s in scores),
        layers=tuple(qg.layers.values()),
        groups=tuple(tuple(group) for group in reading_groups(qg)),
        metric=how.described,
        samples=0 if images is None else count(images),
        seed=how.seed,
        key=key or how.key(qg, images, labels),
        live_sets=live_sets(qg),
        besides=qg.besides,
    )


def _check_images(metric: Metric, images: Inputs | None, labels: Any) -> None:
    if metric != "sqnr" and (images is None or not count(images)):
        raise DataError(
            f"the metric {metric} needs images. Give some with --data, or take --metric sqnr, "
            "which looks at the weights only."
        )
    if (
        metric in LABELLED
        and images is not None
        and (labels is None or len(labels) != count(images))
    ):
        got = "none" if labels is None else f"{len(labels)} for {count(images)} images"
        raise DataError(
            f"the metric {metric} needs the label of every image. Got {got}. Give labels, or take "
            "the metric fisher or kl, which ask the network itself."
        )


def _score(
    candidates: Perturbations, columns: Sequence[Column], batches: Batches | None, how: Scoring
) -> list[float]:
    """Scores in the order of `columns`."""
    if batches is None or how.metric == "sqnr":
        return [_noise_share(candidates, column) for column in columns]
    if how.metric in ("fisher", "gradient"):
        squares = how.metric == "gradient"
        terms = fisher_terms(
            candidates, columns, batches, seed=how.seed, loss=how.loss, squares=squares
        )
        scores: list[float] = terms.scores()[squares].tolist()
    elif how.metric in ("fit", "hawq"):
        hessian = how.metric == "hawq"
        scores = trace_scores(candidates, columns, batches, hessian=hessian, seed=how.seed)
    else:
        labels = batches.labels if how.metric == "loss" else None
        scores = single_scores(candidates, columns, replace(batches, labels=labels))
    return [s / _sharing(candidates, c) for s, c in zip(scores, columns, strict=True)]


def _sharing(candidates: Perturbations, column: Column) -> int:
    """How many layers read the tensor of a candidate: its loss is shared evenly among them."""
    layer, part, _ = column
    tensor = candidates.tensor_of(layer) if part == "activation" else None
    return 1 if tensor is None else len(candidates.readers[tensor])


def _noise_share(candidates: Perturbations, column: Column) -> float:
    """Noise power over signal power of a weight tensor; 0 for activations."""
    layer, part, bits = column
    if part == "activation":
        return 0.0
    signal = float(candidates.weight(layer).double().square().sum())
    noise = float(candidates.weights[layer, bits].double().square().sum())
    return noise / signal if signal > 0 else 0.0
