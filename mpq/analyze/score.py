"""`score_layers`: score every candidate of a network by one of the metrics.

- `fisher`: Fisher quadratic form, one forward and one backward pass (the default)
- `gradient`: the same with the Fisher matrix taken as diagonal, as other tools have it
- `kl`: the true divergence, one candidate at a time
- `sqnr`: noise-to-signal power of the weights; needs no images
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpq.analyze.fisher import FisherTerms, fisher_terms
from mpq.analyze.kl import kl_scores
from mpq.analyze.perturb import Column, Perturbations, Progress, perturb
from mpq.analyze.sensitivity import PARTS, Row, Sensitivity
from mpq.checkpoint import weights_hash
from mpq.errors import DataError, UsageError, nearest
from mpq.graph.annotate import reading_groups
from mpq.graph.ir import QuantGraph

logger = logging.getLogger(__name__)
Metric = Literal["fisher", "gradient", "kl", "sqnr"]
METRICS: tuple[Metric, ...] = get_args(Metric)


def score_layers(
    qg: QuantGraph,
    images: Tensor | None,
    *,
    bits: Sequence[int] = (8, 4),
    act_bits: Sequence[int] = (8,),
    metric: Metric = "fisher",
    seed: int = 0,
    batch: int = 64,
    progress: Progress | None = None,
) -> Sensitivity:
    """Score every layer at every width.

    Args:
        qg: a graph in stage `float` (`mpq.graph.passes.to_float`); it is not changed.
        images: `[N, C, H, W]`, normalised as the network wants it; only `sqnr` can do without.
        bits: weight widths; 16 brings 16-bit activations with it.
        act_bits: activation widths besides.
        metric: how to score.
        seed: of the random draws.
        batch: images per pass; bounds the memory.
        progress: called with (done, total).

    Raises:
        UsageError: an unknown metric or width.
        DataError: no images where the metric needs them, or NaN or infinity inside the network.
        GraphError: the network does not fit the metric.
    """
    weight_bits, activation_bits = _check(bits, act_bits, metric, images)
    columns: list[Column] = [
        (name, part, width)
        for name in qg.layers
        for part, widths in zip(PARTS, (weight_bits, activation_bits), strict=True)
        for width in widths
    ]
    candidates = perturb(
        qg, images, weight_bits=weight_bits, activation_bits=activation_bits, batch=batch
    )
    pairwise = None
    if metric == "sqnr" or images is None:
        scores = [_noise_share(candidates, column) for column in columns]
    elif metric == "kl":
        scores = kl_scores(candidates, columns, images, batch=batch, progress=progress)
        scores = [s / _sharing(candidates, c) for s, c in zip(scores, columns, strict=True)]
    else:
        terms = fisher_terms(candidates, columns, images, seed=seed, batch=batch, progress=progress)
        scores, pairwise = _from_fisher(candidates, columns, terms, metric)
    rows = zip(columns, scores, strict=True)
    return Sensitivity(
        rows=tuple(Row(*c, score=s, sqnr=candidates.sqnr(c)) for c, s in rows),
        layers=tuple(qg.layers.values()),
        groups=tuple(tuple(group) for group in reading_groups(qg)),
        metric=metric,
        samples=0 if images is None else len(images),
        seed=seed,
        key=sensitivity_key(
            qg, images, bits=bits, act_bits=act_bits, metric=metric, seed=seed, batch=batch
        ),
        pairwise=pairwise,
    )


def sensitivity_key(
    qg: QuantGraph,
    images: Tensor | None,
    *,
    bits: Sequence[int] = (8, 4),
    act_bits: Sequence[int] = (8,),
    metric: Metric = "fisher",
    seed: int = 0,
    batch: int = 64,
) -> str:
    """Hash of all that the rows depend on, to recognise a file that is still valid."""
    digest = hashlib.sha256(weights_hash(qg.module.state_dict()).encode())
    if images is not None:
        digest.update(images.detach().cpu().contiguous().numpy().tobytes())
    settings = (sorted(bits), sorted(act_bits), metric, seed, batch)
    digest.update(repr(settings).encode())
    return digest.hexdigest()


def _check(
    bits: Sequence[int], act_bits: Sequence[int], metric: str, images: Tensor | None
) -> tuple[list[int], list[int]]:
    """Widths to score, weights and activations, widest first."""
    if metric not in METRICS:
        raise UsageError(
            f"the metric must be one of {', '.join(METRICS)}. Got {metric!r}"
            f"{nearest(metric, METRICS)}"
        )
    for name, widths in (("weight widths", bits), ("activation widths", act_bits)):
        if not widths or set(widths) - {2, 3, 4, 5, 6, 8, 16}:
            raise UsageError(f"{name} must be some of 16 8 6 5 4 3 2. Got {list(widths)} instead.")
    if metric != "sqnr" and (images is None or not len(images)):
        raise DataError(
            f"the metric {metric} needs images. Give some with --data, or take --metric sqnr, "
            "which looks at the weights only."
        )
    wide = {16} & set(bits)
    return sorted(set(bits), reverse=True), sorted({*act_bits, *wide}, reverse=True)


def _sharing(candidates: Perturbations, column: Column) -> int:
    """How many layers read the tensor of a candidate: its loss is shared evenly among them."""
    layer, part, _ = column
    tensor = candidates.tensor_of(layer) if part == "activation" else None
    return 1 if tensor is None else len(candidates.readers[tensor])


def _from_fisher(
    candidates: Perturbations, columns: Sequence[Column], terms: FisherTerms, metric: str
) -> tuple[list[float], NDArray[np.float64]]:
    """Scores, and the matrix of interactions."""
    sharing = torch.tensor([_sharing(candidates, c) for c in columns], dtype=torch.float64)
    block, diagonal = terms.scores()
    scores = diagonal if metric == "gradient" else block
    shared = terms.block / sharing
    return (scores / sharing).tolist(), (shared.T @ shared / (2 * len(shared))).numpy()


def _noise_share(candidates: Perturbations, column: Column) -> float:
    """Noise power over signal power of a weight tensor; 0 for activations."""
    layer, part, bits = column
    if part == "activation":
        return 0.0
    signal = float(candidates.weight(layer).double().square().sum())
    noise = float(candidates.weights[layer, bits].double().square().sum())
    return noise / signal if signal > 0 else 0.0
