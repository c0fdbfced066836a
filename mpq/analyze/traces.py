"""Scores from the curvature alone: FIT and HAWQ, as their authors have them.

With `Tr` the trace over one tensor and `n` its number of elements,

    FIT     Tr(F) E[dW^2],      F = E[g g'], E[dW^2] = step^2 / 12, step = range / (2^b - 1)
    HAWQ    Tr(H) / n |dW|^2    H the Hessian of the loss, its trace by z'Hz with random signs z

(B. Zandonati et al., "FIT: A Metric for Model Sensitivity", 2022; Z. Dong et al., "HAWQ-V2", 2020;
M. Hutchinson, 1989). One backward pass, or two, for all layers and widths. Steps are those of the
channel; `dW` is what this package's quantizers really do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.analyze.batches import Batch, Batches, Rows
from mpq.analyze.judge import logits_of
from mpq.analyze.perturb import Column, Perturbations, parameter
from mpq.analyze.watch import Watch, reaching, require_finite
from mpq.calls import Inputs
from mpq.quant.operation import LayerOp

TRACE_BATCH = 16
"""Images that a trace is taken from at a time, at most."""


def trace_scores(
    candidates: Perturbations,
    columns: Sequence[Column],
    batches: Batches,
    *,
    hessian: bool,
    seed: int = 0,
) -> list[float]:
    """FIT, or HAWQ where `hessian` is set, in the order of `columns`; never below 0.

    Args:
        candidates: what quantization would do to each tensor.
        columns: candidates to score.
        batches: images with labels; the loss is the cross-entropy. The Fisher trace is taken from
            batch means, so their size matters; at most `TRACE_BATCH`.
        hessian: take the trace of the Hessian rather than of the Fisher matrix.
        seed: of the random signs.

    Raises:
        DataError: NaN or infinity, with the layer where it begins.
        GraphError: a network that is no classifier.
    """
    probe = _Probe(candidates, columns)

    def measure(part: Batch) -> Rows:
        assert part.labels is not None
        answer, tensors = probe.run(part.images)
        logits = logits_of(candidates.graph, answer, "a metric of labels")
        require_finite(logits, candidates.graph, part.images)
        loss = F.cross_entropy(logits, part.labels.to(logits.device))
        generator = torch.Generator().manual_seed(seed + part.index)
        squares = _curvature(loss, tensors, part.count, hessian, generator)
        found = np.array([probe.score(c, squares, tensors, hessian=hessian) for c in columns])
        part.tick()
        return np.repeat(found[None], part.count, axis=0)

    batches = replace(batches, size=min(batches.size, TRACE_BATCH))
    rows = batches.rows(measure)
    return [max(float(value), 0.0) for value in rows.mean(0)]


def _curvature(
    loss: Tensor, tensors: dict[str, Tensor], count: int, hessian: bool, generator: torch.Generator
) -> dict[str, Tensor]:
    """For each tensor its elements' share of the trace, like the tensor in shape."""
    names, values = list(tensors), list(tensors.values())
    grads = torch.autograd.grad(loss, values, create_graph=hessian)
    if not hessian:
        return {n: count * g.square() for n, g in zip(names, grads, strict=True)}
    signs = [(torch.randint(0, 2, v.shape, generator=generator) * 2 - 1).to(v) for v in values]
    product = sum((g * z).sum() for g, z in zip(grads, signs, strict=True))
    assert isinstance(product, Tensor)
    # Where the loss is linear in a tensor, nothing reaches it a second time.
    second = torch.autograd.grad(product, values, allow_unused=True)
    return {
        n: torch.zeros_like(z) if h is None else (h * z).detach()
        for n, h, z in zip(names, second, signs, strict=True)
    }


class _Probe:
    """Runs the network with weights and activations that gradients can be taken of."""

    def __init__(self, candidates: Perturbations, columns: Sequence[Column]) -> None:
        self.candidates = candidates
        self.module = candidates.graph.module
        self.weights = {n: parameter(self.module, n) for n in candidates.graph.layers}
        seen = {candidates.tensor_of(n) for n, part, _ in columns if part == "activation"}
        self.seen: dict[str, Tensor] = {}
        self.watch = Watch(candidates.graph, [t for t in seen if t], self._see)
        for weight in self.weights.values():
            weight.requires_grad_(True)

    def run(self, images: Inputs) -> tuple[Any, dict[str, Tensor]]:
        """The answer, and the tensors that the trace is taken over."""
        self.seen = {}
        answer = self.watch.answer(reaching(images))
        weights: dict[str, Tensor] = {f"weight {n}": w for n, w in self.weights.items()}
        return answer, weights | {f"tensor {n}": t for n, t in self.seen.items()}

    def _see(self, name: str, x: Tensor) -> Tensor:
        self.seen[name] = x
        return x

    def score(
        self,
        column: Column,
        squares: dict[str, Tensor],
        tensors: dict[str, Tensor],
        *,
        hessian: bool,
    ) -> float:
        """The score of a candidate from one batch."""
        layer, part, bits = column
        if part == "activation":
            tensor = self.candidates.tensor_of(layer)
            grid = None if tensor is None else self.candidates.grids.get((tensor, bits))
            if grid is None:
                return 0.0
            trace, x = squares[f"tensor {tensor}"], tensors[f"tensor {tensor}"].detach()
            if hessian:
                return float(trace.sum() / trace.numel() * grid.noise(x).square().sum())
            return float(trace.sum() * grid.scale.square()) / 12
        trace = squares[f"weight {layer}"]
        if hessian:
            noise = self.candidates.weights[layer, bits]
            return float(trace.sum() / trace.numel() * noise.square().sum())
        axis = LayerOp.of(self.module.get_submodule(layer)).axis
        flat = self.candidates.weight(layer).transpose(0, axis).flatten(1)
        step = (flat.amax(1) - flat.amin(1)) / (2**bits - 1)
        return float((trace.transpose(0, axis).flatten(1).sum(1) * step.square()).sum()) / 12
