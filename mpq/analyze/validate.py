"""How far to trust the scores: predicted against measured loss of random configurations.

Configurations are run as the search takes them, every tensor with the noise of its width, on images
that were not scored. The truth is the divergence of the answers from those of the float network
(`mpq.analyze.judge`); the increase of the loss on the labels is measured beside it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.analyze import cost
from mpq.analyze.batches import Progress
from mpq.analyze.judge import Answers, Judge, logits_of
from mpq.analyze.perturb import Perturbations
from mpq.analyze.sensitivity import Sensitivity
from mpq.analyze.watch import Watch
from mpq.calls import Inputs, split
from mpq.calls import count as count_of
from mpq.layers import Widths

FEW = 3
"""Fewer points than this have no rank correlation."""


@dataclass(frozen=True, slots=True)
class Truth:
    """One configuration: what was predicted, and what was measured.

    Args:
        widths: (weight bits, activation bits) of each layer.
        effective_bits: mean width of the weights.
        predicted: sum of the scores.
        kl: mean divergence from the float network's answers, in nats.
        loss: increase of the cross-entropy on the labels, in nats; None without labels.
        top1: percent of the labels that are met; None without labels.
        judged: what is lost by the metric that was asked for; None without one.
    """

    widths: dict[str, Widths]
    effective_bits: float
    predicted: float
    kl: float
    loss: float | None
    top1: float | None
    judged: float | None = None


@dataclass(frozen=True)
class Validation:
    """Predicted and measured losses of random configurations, with Spearman's rank correlations."""

    metric: str
    images: int
    seed: int
    truths: tuple[Truth, ...]
    judge: str = ""

    @property
    def rho(self) -> float:
        """Rank correlation of prediction and divergence; NaN where either is constant."""
        return spearman([t.predicted for t in self.truths], [t.kl for t in self.truths])

    @property
    def rho_loss(self) -> float | None:
        """Rank correlation of prediction and increase of the loss; None without labels."""
        losses = [t.loss for t in self.truths if t.loss is not None]
        return spearman([t.predicted for t in self.truths], losses) if losses else None

    @property
    def rho_judge(self) -> float | None:
        """Rank correlation of prediction and loss by the metric `judge`; None without one."""
        lost = [t.judged for t in self.truths if t.judged is not None]
        return spearman([t.predicted for t in self.truths], lost) if lost else None

    def to_json(self) -> dict[str, Any]:
        """The content of `validation.json`."""
        judged = {"judge": self.judge, "rho_judge": _number(self.rho_judge)} if self.judge else {}
        return {
            "metric": self.metric,
            "images": self.images,
            "seed": self.seed,
            "rho": _number(self.rho),
            "rho_loss": _number(self.rho_loss),
            **judged,
            "policies": [_known(t) for t in self.truths],
        }


def _known(truth: Truth) -> dict[str, Any]:
    found = asdict(truth)
    if truth.judged is None:
        del found["judged"]
    return found


def spearman(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN for fewer than three points and for constant ones."""
    if len(predicted) < FEW or len(set(predicted)) == 1 or len(set(measured)) == 1:
        return float("nan")
    from scipy.stats import spearmanr  # half a second that only this needs

    return float(spearmanr(predicted, measured)[0])


def _number(value: float | None) -> float | None:
    """None for NaN, which JSON has not."""
    return value if value == value else None


def random_widths(
    sensitivity: Sensitivity, pairs: Sequence[Widths], *, count: int, seed: int
) -> list[dict[str, Widths]]:
    """Random configurations, all different as far as there are so many.

    Each has a random mixture of its own, so that they spread from all narrow to all wide; layers
    that read one tensor agree on its width.
    """
    rng = random.Random(seed)
    found: list[dict[str, Widths]] = []
    head = {n: group[0] for group in sensitivity.groups for n in group}
    seen: set[tuple[Widths, ...]] = set()
    for _ in range(20 * count):
        if len(found) == count:
            break
        odds = [rng.random() ** 2 for _ in pairs]
        widths: dict[str, Widths] = {}
        for layer in sensitivity.layers:
            leader = widths.get(head.get(layer.name, ""))
            allowed = [p for p in pairs if leader is None or p[1] == leader[1]]
            odds_of = [odds[pairs.index(p)] for p in allowed]
            widths[layer.name] = rng.choices(allowed, odds_of)[0]
        key = tuple(widths.values())
        if key not in seen:
            seen.add(key)
            found.append(widths)
    return found


def validate(
    simulator: Simulator,
    sensitivity: Sensitivity,
    pairs: Sequence[Widths],
    *,
    count: int = 50,
    seed: int = 0,
    progress: Progress | None = None,
) -> Validation:
    """Measure random configurations and compare with what the scores say of them.

    Args:
        simulator: of the network that was scored, with other images.
        sensitivity: its scores.
        pairs: widths to draw from, all known to the simulator.
        count: number of configurations.
        seed: of the draw.
        progress: called with (done, count).
    """
    truths = []
    drawn = random_widths(sensitivity, pairs, count=count, seed=seed)
    for done, widths in enumerate(drawn, 1):
        measured = *simulator.measure(widths), simulator.judged
        effective = cost.effective_bits(sensitivity.layers, widths)
        truths.append(Truth(widths, effective, sensitivity.predict(widths), *measured))
        if progress:
            progress(done, len(drawn))
    judge = simulator.metric[0] if simulator.metric else ""
    return Validation(sensitivity.metric, simulator.count, seed, tuple(truths), judge)


Judged = Callable[[Callable[[Inputs], Any]], float]
"""What a network, as a function of inputs, loses by a metric: less is better, zero is nothing."""


class Simulator:
    """Runs the float graph with the perturbations of one configuration after another.

    Args:
        candidates: the perturbations, from images that were scored.
        images: images to measure on, `[N, C, H, W]`, or inputs (`mpq.calls`).
        labels: `[N]`, or None; labels need a network that is a classifier.
        batch: images per pass.
        metric: name and function of a metric that is measured too, on batches of its own.
    """

    def __init__(
        self,
        candidates: Perturbations,
        images: Inputs,
        labels: Tensor | None,
        batch: int = 100,
        metric: tuple[str, Judged] | None = None,
    ) -> None:
        self.metric, self.judged = metric, None if metric is None else 0.0
        self.candidates, self.labels, self.count = candidates, labels, count_of(images)
        self.parts = split(images, batch)
        self.floats = {n: candidates.weight(n).clone() for n in candidates.graph.layers}
        self.bits: dict[str, int] = {}
        self.watch = Watch(candidates.graph, list(candidates.readers), self._quantize)
        self.judge = Judge.of(candidates.graph, images, batch)
        self.reference = self._run()

    def measure(self, widths: Mapping[str, Widths]) -> tuple[float, float | None, float | None]:
        """Divergence, increase of the loss, and top-1 of a configuration.

        What it loses by the metric is then in `judged`.
        """
        readers = self.candidates.readers.items()
        self.bits = {t: max(widths[n][1] or 32 for n in names) for t, names in readers}
        for name, (bits, _) in widths.items():
            if bits is not None:
                quantized = self.floats[name] + self.candidates.weights[name, bits]
                self.candidates.weight(name).copy_(quantized)
        try:
            found = self._run()
            self.judged = self.metric[1](self.watch.answer) if self.metric else None
        finally:
            for name, weight in self.floats.items():
                self.candidates.weight(name).copy_(weight)
            self.bits = {}
        costs = [
            self.judge.cost(before, after, count_of(part))
            for before, after, part in zip(self.reference, found, self.parts, strict=True)
        ]
        cost = float(torch.cat(costs).mean())
        if self.labels is None:
            return cost, None, None
        before, after = (self._log_probabilities(answers) for answers in (self.reference, found))
        loss = F.nll_loss(after, self.labels) - F.nll_loss(before, self.labels)
        top1 = 100 * float((after.argmax(1) == self.labels).double().mean())
        return cost, float(loss), top1

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        grid = self.candidates.grids.get((name, self.bits.get(name, 32)))
        return x if grid is None else x + grid.noise(x)

    @torch.no_grad()
    def _run(self) -> list[Answers]:
        return [self.judge.answers(self.watch.answer(part)) for part in self.parts]

    def _log_probabilities(self, answers: Sequence[Answers]) -> Tensor:
        logits = [logits_of(self.candidates.graph, dict(a), "a loss on labels") for a in answers]
        return torch.cat(logits).double().log_softmax(1)
