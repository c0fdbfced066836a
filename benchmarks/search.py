"""Are the policies that the search finds better than others of the same bytes?

    MPQ_DATA=... python benchmarks/search.py resnet20-cifar10.pth --data cifar10 \
        --normalize imagenet --budgets 4.2 4.5 5.2 6.0 --bits 8 4 2 --act-bits 8

For each budget of effective weight bits: what the search finds, `size` (the largest layers are
narrowed first, which needs no scores) and random policies, each filled up to the budget. All are
quantized without training (`mpq ptq` at the effort named), with several sets of calibration images,
and measured on test images from 5,000 on: top-1, and the divergence from the float network, which
tells policies apart that differ by less than the noise of top-1; beside it the paired difference to
the search with its standard error.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HALF
from numpy.typing import NDArray
from torch import Tensor, nn

from mpq.analyze import Scoring, Search, candidates, score_layers
from mpq.analyze.cost import effective_bits
from mpq.analyze.sensitivity import Sensitivity
from mpq.checkpoint import Reading
from mpq.data import Normalization
from mpq.files import write_json
from mpq.graph.ir import QuantGraph
from mpq.layers import LayerInfo, Widths
from mpq.numerics import kl_divergence
from mpq.pipeline.dropping import quantized
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.policy import Constraints
from mpq.train.evaluate import predict, top1
from mpq.userimport import trust

Config = dict[str, Widths]
Row = dict[str, Any]


def filled(
    scores: Sensitivity, bits: Sequence[int], act: int, budget: float, order: Sequence[str]
) -> Config:
    """Narrow layers in that order until the budget is met, then widen again what still fits."""
    steps = sorted(bits, reverse=True)
    widths: Config = {layer.name: (steps[0], act) for layer in scores.layers}

    def move(name: str, by: int) -> bool:
        at = steps.index(widths[name][0] or steps[0]) + by
        if not 0 <= at < len(steps):
            return False
        widths[name] = (steps[at], act)
        return True

    for _ in steps:
        for name in order:
            if effective_bits(scores.layers, widths) > budget:
                move(name, 1)
    for name in reversed(order):
        while move(name, -1):
            if effective_bits(scores.layers, widths) > budget:
                move(name, 1)
                break
    return widths


def rivals(scores: Sensitivity, budget: float, args: argparse.Namespace) -> dict[str, Config]:
    """The policies of one budget, by name; the search's own first."""
    pairs, act = candidates(args.bits, (args.act_bits,)), args.act_bits
    largest = [i.name for i in sorted(scores.layers, key=lambda i: -i.params)]
    found = Search(scores, widths=pairs).allocate(Constraints(effective_bits=budget))
    named = {"search": found.widths}
    named["size"] = filled(scores, args.bits, act, budget, largest)
    rng = random.Random(args.seed)
    for k in range(args.random):
        order = rng.sample(largest, len(largest))
        named[f"random {k}"] = filled(scores, args.bits, act, budget, order)
    return named


class Judge:
    """Quantizes configurations and measures them on test images.

    Images are those from `HALF` on by official index, where there are so many.
    """

    def __init__(self, subject: Subject, graph: QuantGraph, args: argparse.Namespace) -> None:
        test = subject.require_data("the comparison").test
        begin = HALF if len(test) > HALF else 0
        told = np.arange(begin, min(begin + args.test, len(test)))
        self.images, self.labels = test.read(told), test.labels[told]
        self.calibrations = [
            subject.sample(args.calibration, args.seed + k, "calibration")
            for k in range(args.calibrations)
        ]
        self.graph, self.normalize, self.effort = graph, subject.normalize, args.effort
        self.reference = self.answers(graph.module)
        self.top1 = top1(self.reference, self.labels)

    def measure(self, widths: Config) -> tuple[list[float], NDArray[np.float64]]:
        """Per calibration: top-1 in percent, and the divergence of each image `[k, N]` in nats."""
        modules = [
            quantized(self.graph, widths, images, effort=self.effort)
            for images in self.calibrations
        ]
        found = [self.answers(module) for module in modules]
        rows = np.stack([kl_divergence(self.reference, one).numpy() for one in found])
        return [top1(one, self.labels) for one in found], rows

    def answers(self, module: nn.Module) -> Tensor:
        """Log-probabilities of the test images, float64 `[N, C]`."""
        return predict(module, self.images, self.normalize).double().log_softmax(1)


def compare(
    named: dict[str, Config], judge: Judge, layers: Sequence[LayerInfo], budget: float
) -> Iterator[Row]:
    """Each policy as measured, and paired with the first, which the search found."""
    base: NDArray[np.float64] | None = None
    for name, widths in named.items():
        accuracies, rows = judge.measure(widths)
        losses = rows.mean(0)
        base = losses if base is None else base
        off = losses - base
        yield {
            "budget": budget,
            "bits": effective_bits(layers, widths),
            "policy": name,
            "top1": accuracies,
            "kl": rows.mean(1).tolist(),
            "off": float(off.mean()),
            "error": float(off.std(ddof=1) / len(off) ** 0.5),
            "widths": [pair[0] for pair in widths.values()],
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--normalize")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.2, 4.5, 5.2, 6.0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4])
    parser.add_argument("--act-bits", type=int, default=8)
    parser.add_argument("--metric", default="fisher")
    parser.add_argument("--rounding", choices=("nearest", "feedback"), default="nearest")
    parser.add_argument("--random", type=int, default=5)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--calibrations", type=int, default=1, help="sets of such images")
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    normalize = Normalization.parse(args.normalize) if args.normalize else None
    trust(args.model or "")  # the user has named it
    subject = open_checkpoint(
        args.checkpoint, DataSource(args.data), reading=Reading(args.model), normalize=normalize
    )
    graph = subject.graph()
    start = time.process_time()
    images, labels = subject.labelled(
        subject.require_data("scoring").train, args.samples, args.seed
    )
    scores = score_layers(
        graph,
        images,
        labels,
        Scoring(tuple(args.bits), (args.act_bits,), args.metric, rounding=args.rounding),
    )
    print(f"scoring: {time.process_time() - start:.1f} s of CPU")
    judge = Judge(subject, graph, args)
    print(f"float: {judge.top1:.2f} of {len(judge.labels)} images")
    rows: list[Row] = []
    for budget in args.budgets:
        for row in compare(rivals(scores, budget, args), judge, scores.layers, budget):
            rows.append(row)
            print(
                f"{budget:4.1f} {row['policy']:10s} {row['bits']:.3f} bits"
                f"  top-1 {np.mean(row['top1']):.2f}  KL x1000 "
                f"{' '.join(f'{1e3 * k:.2f}' for k in row['kl'])}  to search"
                f" {1e3 * row['off']:+.2f} +- {1e3 * row['error']:.2f}"
                f"  {' '.join(map(str, row['widths']))}",
                flush=True,
            )
        if args.out:
            write_json(args.out, json.loads(json.dumps({"settings": str(args), "rows": rows})))


if __name__ == "__main__":
    main()
