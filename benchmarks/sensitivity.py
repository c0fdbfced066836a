"""How well each metric ranks configurations: predicted against measured increase of the loss.

    python benchmarks/sensitivity.py model.pth --data cifar10 --kind free budget activations

Random configurations are simulated on test images and compared by Spearman's rank correlation.
`free`: weights at 8 or 4 bits in any proportion; `budget`: the same, all near one number of
effective bits, which is the question that a search asks; `activations`: weights and activations at
8 or 4. The truth is KL(float || quantized), the increase of the cross-entropy under the network's
own answers; the increase under the labels is printed beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from mpq.analyze import cost
from mpq.analyze.fisher import TEMPERATURE, fisher_terms
from mpq.analyze.perturb import Column, Perturbations, perturb
from mpq.analyze.score import score_layers
from mpq.analyze.watch import Watch
from mpq.checkpoint import load_model
from mpq.data import Normalization, open_data, sample_indices
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float
from mpq.layers import LayerInfo
from mpq.rundir import write_json

Widths = dict[str, tuple[int, int]]
Scores = Mapping[Column, float]
WIDTHS = (8, 4)
KINDS = ("free", "budget", "activations")
BAND = 0.15
"""How far from the budget the effective bits of a `budget` configuration may be."""


@dataclass(frozen=True)
class Truth:
    """What a configuration really costs."""

    widths: Widths
    kl: float
    loss: float
    top1: float


def random_policies(
    layers: Sequence[LayerInfo], kind: str, *, count: int, budget: float, seed: int
) -> list[Widths]:
    """Random configurations of 8 and 4 bits."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        share, act_share = rng.random(), rng.random() if kind == "activations" else 0.0
        widths = {
            layer.name: (
                4 if rng.random() < share else 8,
                4 if rng.random() < act_share else 8,
            )
            for layer in layers
        }
        if kind != "budget" or abs(cost.effective_bits(layers, widths) - budget) <= BAND:
            found.append(widths)
    return found


class Simulator:
    """Runs the float graph with the perturbations of a configuration (8-bit activations exact)."""

    def __init__(self, candidates: Perturbations, images: Tensor, labels: Tensor) -> None:
        self.candidates, self.images, self.labels = candidates, images, labels
        self.floats = {n: candidates.weight(n).clone() for n in candidates.graph.layers}
        self.bits: dict[str, int] = {}
        tensors = list(candidates.readers)
        self.watch = Watch(candidates.graph, tensors, self._quantize)
        self.reference = self._log_probabilities()

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        bits = self.bits.get(name, 8)
        return x if bits == 8 else x + self.candidates.grids[name, bits].noise(x)

    @torch.no_grad()
    def _log_probabilities(self) -> Tensor:
        parts = torch.split(self.images, 100)
        return torch.cat([self.watch.run(part).log_softmax(1) for part in parts])

    def measure(self, widths: Widths) -> Truth:
        """Simulate one configuration."""
        readers = self.candidates.readers.items()
        self.bits = {t: max(widths[n][1] for n in names) for t, names in readers}
        for name, (bits, _) in widths.items():
            quantized = self.floats[name] + self.candidates.weights[name, bits]
            self.candidates.weight(name).copy_(quantized)
        found = self._log_probabilities()
        for name, weight in self.floats.items():
            self.candidates.weight(name).copy_(weight)
        self.bits = {}
        loss = F.nll_loss(found, self.labels) - F.nll_loss(self.reference, self.labels)
        return Truth(
            widths,
            kl=float((self.reference.exp() * (self.reference - found)).sum(1).mean()),
            loss=float(loss),
            top1=float((found.argmax(1) == self.labels).double().mean()) * 100,
        )


def fit_scores(candidates: Perturbations, images: Tensor, labels: Tensor) -> dict[Column, float]:
    """FIT (Zandonati et al., 2022) of weights: `Tr(F) (range / (2^b - 1))^2 / 12` per channel."""
    module, batch = candidates.graph.module, 16
    parameters = {n: module.get_submodule(n).weight for n in candidates.graph.layers}
    traces: dict[str, Tensor] = {n: torch.zeros(len(w)) for n, w in parameters.items()}  # type: ignore[arg-type]
    for weight in parameters.values():
        weight.requires_grad_(True)
    steps = list(zip(torch.split(images, batch), torch.split(labels, batch), strict=True))
    for x, y in steps:
        grads = torch.autograd.grad(F.cross_entropy(module(x), y), list(parameters.values()))  # type: ignore[arg-type]
        for name, grad in zip(parameters, grads, strict=True):
            traces[name] += len(x) * grad.flatten(1).square().sum(1) / len(steps)
    for weight in parameters.values():
        weight.requires_grad_(False)
    spans = {n: candidates.weight(n).flatten(1) for n in parameters}
    spans = {n: flat.amax(1) - flat.amin(1) for n, flat in spans.items()}
    return {
        (n, "weight", b): float((traces[n] * (spans[n] / (2**b - 1)) ** 2).sum()) / 12
        for n in parameters
        for b in WIDTHS
    }


def metrics(
    qg: QuantGraph, candidates: Perturbations, images: Tensor, labels: Tensor, seed: int
) -> tuple[dict[str, Callable[[Sequence[Column]], float]], dict[str, float]]:
    """Predictors of a configuration's loss from its columns, and the seconds that each took."""
    predictors: dict[str, Callable[[Sequence[Column]], float]] = {}
    seconds: dict[str, float] = {}

    def additive(scores: Scores) -> Callable[[Sequence[Column]], float]:
        return lambda chosen: sum(scores.get(c, 0.0) for c in chosen)

    def timed(name: str, make: Callable[[], Scores]) -> None:
        start = time.perf_counter()
        predictors[name] = additive(make())
        seconds[name] = time.perf_counter() - start

    for metric in ("fisher", "gradient", "kl", "sqnr"):
        timed(metric, lambda m=metric: _rows(qg, images, m, seed))  # type: ignore[misc]
    timed("fit (weights)", lambda: fit_scores(candidates, images, labels))
    columns = [
        (name, part, bits)
        for name in qg.layers
        for part in ("weight", "activation")
        for bits in WIDTHS
    ]
    for temperature in (1.0, TEMPERATURE, 4.0):
        terms = fisher_terms(candidates, columns, images, seed=seed, temperature=temperature)  # type: ignore[arg-type]
        block, diagonal = terms.scores()
        for name, values in (("block", block), ("diagonal", diagonal)):
            scores: Scores = dict(zip(columns, values.tolist(), strict=True))  # type: ignore[assignment,arg-type]
            predictors[f"{name}, T={temperature:g}"] = additive(scores)
        predictors[f"pairwise, T={temperature:g}"] = _quadratic(columns, terms.block)  # type: ignore[arg-type]
    return predictors, seconds


def _rows(qg: QuantGraph, images: Tensor, metric: str, seed: int) -> Scores:
    found = score_layers(qg, images, bits=WIDTHS, act_bits=WIDTHS, metric=metric, seed=seed)  # type: ignore[arg-type]
    return {(r.layer, r.part, r.bits): r.score for r in found.rows}


def _quadratic(columns: Sequence[Column], block: Tensor) -> Callable[[Sequence[Column]], float]:
    place = {c: i for i, c in enumerate(columns)}
    return lambda chosen: float(block[:, [place[c] for c in chosen]].sum(1).square().mean() / 2)


def chosen_columns(widths: Widths, kind: str) -> list[Column]:
    """The candidates that a configuration takes."""
    columns: list[Column] = []
    for name, (bits, act_bits) in widths.items():
        columns.append((name, "weight", bits))
        if kind == "activations" and act_bits < 8:
            columns.append((name, "activation", act_bits))
    return columns


def rho(predicted: Sequence[float], truth: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    return float(spearmanr(predicted, truth)[0])


def load(
    args: argparse.Namespace,
) -> tuple[QuantGraph, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The float graph, and (images, labels) of training and of test."""
    loaded = load_model(args.checkpoint, arch=args.model)
    data = open_data(args.data, root=args.data_root)
    normalize = Normalization.parse(args.normalize or loaded.info.normalize)

    def read(source: object, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        images = torch.from_numpy(normalize.apply(source.read(indices)))  # type: ignore[attr-defined]
        return images, torch.from_numpy(source.labels[indices])  # type: ignore[attr-defined]

    train = read(data.train, sample_indices(data.train, args.samples, args.seed))
    test = read(data.test, np.arange(args.test))
    return to_float(loaded.module, train[0][:2]), train, test


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", help="architecture or module:factory")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root")
    parser.add_argument("--normalize")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--policies", type=int, default=60)
    parser.add_argument("--effective-bits", type=float, default=4.8)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--test", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    qg, (images, labels), test = load(args)
    candidates = perturb(qg, images, weight_bits=WIDTHS, activation_bits=WIDTHS)
    predictors, seconds = metrics(qg, candidates, images, labels, args.seed)
    print("seconds:", {k: round(v, 2) for k, v in seconds.items()})
    simulator = Simulator(candidates, *test)
    report: dict[str, object] = {"seconds": seconds, "samples": args.samples, "test": args.test}
    for kind in args.kind:
        policies = random_policies(
            list(qg.layers.values()),
            kind,
            count=args.policies,
            budget=args.effective_bits,
            seed=args.seed,
        )
        truths = [simulator.measure(widths) for widths in policies]
        report[kind] = {
            "rho": table(kind, predictors, truths),
            "truths": [asdict(t) for t in truths],
        }
    if args.out:
        write_json(args.out, json.loads(json.dumps(report)))


def table(
    kind: str,
    predictors: Mapping[str, Callable[[Sequence[Column]], float]],
    truths: Sequence[Truth],
) -> dict[str, list[float]]:
    """Print and return the rank correlations with KL, loss, and top-1 lost."""
    kl, loss, lost = [t.kl for t in truths], [t.loss for t in truths], [-t.top1 for t in truths]
    print(f"\n{kind}: {len(truths)} configurations, KL {min(kl):.3g}..{max(kl):.3g}")
    print(f"{'metric':24s} {'KL':>6s} {'loss':>6s} {'top-1':>6s}  predicted/KL")
    found = {}
    for name, predict in predictors.items():
        predicted = [predict(chosen_columns(t.widths, kind)) for t in truths]
        found[name] = [rho(predicted, truth) for truth in (kl, loss, lost)]
        ratio = float(np.median(np.array(predicted) / np.array(kl)))
        print(f"{name:24s} " + " ".join(f"{r:6.3f}" for r in found[name]) + f"  {ratio:.3g}")
    return found


if __name__ == "__main__":
    main()
