"""Are the policies that the search finds better than others of the same bytes?

    MPQ_DATA=... python benchmarks/search.py resnet20-cifar10.pth --data cifar10 \
        --normalize imagenet --budgets 4.2 4.5 5.2 6.0 --bits 8 4 2 --act-bits 8

For each budget of effective weight bits: what the search finds, `size` (the largest layers are
narrowed first, which needs no scores) and random policies, each filled up to the budget. All are
quantized without training (`mpq ptq` at the effort named) and measured on the first test images by
official index: top-1, and the divergence from the float network, which tells policies apart that
differ by less than the noise of top-1.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq.analyze import allocate, candidates, score_layers
from mpq.analyze.cost import Widths, effective_bits
from mpq.analyze.explain import allocation_policy
from mpq.analyze.sensitivity import Sensitivity
from mpq.data import Normalization
from mpq.files import write_json
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare
from mpq.pipeline.subject import Source, Subject, open_checkpoint
from mpq.policy import Constraints
from mpq.ptq import quantize_graph
from mpq.train.evaluate import predict, top1

Config = dict[str, Widths]


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


def rivals(
    scores: Sensitivity, bits: Sequence[int], act: int, budget: float, args: argparse.Namespace
) -> dict[str, Config]:
    """The policies of one budget, by name."""
    pairs = candidates(bits, (act,))
    found = allocate(scores, Constraints(effective_bits=budget), pairs=pairs)
    largest = [i.name for i in sorted(scores.layers, key=lambda i: -i.params)]
    named = {"search": found.widths, "size": filled(scores, bits, act, budget, largest)}
    rng = random.Random(args.seed)
    for k in range(args.random):
        order = rng.sample(largest, len(largest))
        named[f"random {k}"] = filled(scores, bits, act, budget, order)
    return named


class Judge:
    """Quantizes configurations and measures them on the first test images."""

    def __init__(self, subject: Subject, graph: QuantGraph, args: argparse.Namespace) -> None:
        test = subject.require_data("the comparison").test
        first = np.arange(min(args.test, len(test)))
        self.images, self.labels = test.read(first), test.labels[first]
        self.calibration = subject.sample(args.calibration, args.seed, "calibration")
        self.subject, self.graph, self.effort = subject, graph, args.effort
        self.reference = self._log_probabilities(graph.module)
        self.top1 = top1(self.reference, self.labels)

    def _log_probabilities(self, module: torch.nn.Module) -> torch.Tensor:
        return predict(module, self.images, self.subject.normalize).double().log_softmax(1)

    def measure(self, widths: Config) -> tuple[float, float]:
        """Top-1 in percent, and the divergence from the float network's answers in nats."""
        prepared = prepare(self.graph, allocation_policy(widths))
        quantize_graph(prepared, self.calibration, effort=self.effort)
        found = self._log_probabilities(prepared.module)
        kl = (self.reference.exp() * (self.reference - found)).sum(1).mean()
        return top1(found, self.labels), float(kl)


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
    parser.add_argument("--effort", default="fast")
    parser.add_argument("--test", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    normalize = Normalization.parse(args.normalize) if args.normalize else None
    subject = open_checkpoint(
        args.checkpoint, Source(args.data), arch=args.model, normalize=normalize
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
        bits=args.bits,
        act_bits=(args.act_bits,),
        metric=args.metric,
        rounding=args.rounding,
    )
    print(f"scoring: {time.process_time() - start:.1f} s of CPU")
    judge = Judge(subject, graph, args)
    print(f"float: {judge.top1:.2f} of {len(judge.labels)} images")
    rows: list[dict[str, Any]] = []
    for budget in args.budgets:
        named = rivals(scores, args.bits, args.act_bits, budget, args)
        for name, widths in named.items():
            bits = effective_bits(scores.layers, widths)
            found, kl = judge.measure(widths)
            rows.append(
                {
                    "budget": budget,
                    "policy": name,
                    "effective_bits": bits,
                    "top1": found,
                    "kl": kl,
                    "predicted": scores.predict(widths),
                    "widths": [pair[0] for pair in widths.values()],
                }
            )
            print(
                f"{budget:4.1f} {name:10s} {bits:.3f} bits  top-1 {found:.2f}  KL {kl:.4f}"
                f"  {' '.join(str(pair[0]) for pair in widths.values())}",
                flush=True,
            )
        if args.out:
            write_json(args.out, json.loads(json.dumps({"settings": str(args), "rows": rows})))


if __name__ == "__main__":
    main()
