"""How well each metric ranks configurations: predicted against measured loss of random policies.

    python benchmarks/sensitivity.py model.pth --data cifar10 --kind w84 w1684 wa84 wa1684

For each kind, random configurations are simulated once on test images that nobody scored, and every
metric's prediction is compared with the divergence from the float network's answers (and with the
increase of the loss on the labels) by Spearman's rank correlation. Kinds: weights only (`w`) or
weights and activations (`wa`), of 8 and 4 bits (`84`) or 16, 8 and 4 (`1684`); `budget` draws 8/4
weights near one number of effective bits, which is the question that a search asks.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq.analyze import Scoring, candidates, score_layers
from mpq.analyze.cost import effective_bits
from mpq.analyze.perturb import perturb
from mpq.analyze.score import METRICS
from mpq.analyze.sensitivity import Sensitivity
from mpq.analyze.validate import Simulator, random_widths, spearman
from mpq.checkpoint import load_model
from mpq.cpu import this_cpu
from mpq.data import Normalization, open_data, sample_indices
from mpq.files import write_json
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float
from mpq.layers import Widths
from mpq.userimport import trust

KINDS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "w84": ((8, 4), (8,)),
    "w1684": ((16, 8, 4), (8,)),
    "wa84": ((8, 4), (8, 4)),
    "wa1684": ((16, 8, 4), (8, 4)),
    "budget": ((8, 4), (8,)),
}
BAND = 0.15
"""How far from the budget the effective bits of a `budget` configuration may be."""
Predict = Callable[[Mapping[str, Widths]], float]
Labelled = tuple[Tensor, Tensor]


def load(args: argparse.Namespace) -> tuple[QuantGraph, Labelled, Labelled]:
    """The float graph, and (images, labels) of training and of test."""
    trust(args.model or "")  # the user has named it
    loaded = load_model(args.checkpoint, arch=args.model)
    data = open_data(args.data or loaded.data, root=args.data_root, size=loaded.info.input[1:])
    normalize = Normalization.parse(args.normalize or loaded.info.normalize)

    def read(source: Any, indices: Any) -> Labelled:
        images = torch.from_numpy(normalize.apply(source.read(indices)))
        return images, torch.from_numpy(source.labels[indices])

    train = read(data.train, sample_indices(data.train, args.samples, args.seed))
    test = read(data.test, np.arange(min(args.test, len(data.test))))
    return to_float(loaded.module, train[0][:2]), train, test


def predictors(
    qg: QuantGraph, train: Labelled, args: argparse.Namespace
) -> tuple[dict[str, Predict], dict[str, float], Sensitivity]:
    """What each metric predicts, the CPU seconds it took, and the scores of the default."""
    found: dict[str, Predict] = {}
    seconds: dict[str, float] = {}
    default: Sensitivity | None = None
    for metric in args.metric:
        start = time.process_time()
        scores = score_layers(
            qg,
            *train,
            how=Scoring(
                bits=(16, 8, 4),
                act_bits=(8, 4),
                metric=metric,
                seed=args.seed,
                rounding=args.rounding,
            ),
        )
        seconds[metric] = round(time.process_time() - start, 2)
        print(f"{metric}: {seconds[metric]:.2f} s of CPU", flush=True)
        found[metric] = scores.predict
        if metric == "fisher":
            default = scores
    assert default is not None, "name the metric fisher among --metric"
    return found, seconds, default


def draw(scores: Sensitivity, kind: str, args: argparse.Namespace) -> list[dict[str, Widths]]:
    """Random configurations of one kind."""
    pairs = candidates(*KINDS[kind])
    count = args.policies if kind != "budget" else 60 * args.policies
    drawn = random_widths(scores, pairs, count=count, seed=args.seed)
    if kind == "budget":
        drawn = [
            w for w in drawn if abs(effective_bits(scores.layers, w) - args.effective_bits) <= BAND
        ]
    return drawn[: args.policies]


def judge(
    kind: str,
    told: Mapping[str, Predict],
    scores: Sensitivity,
    simulator: Simulator,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Rank correlations of one kind, by metric: with the divergence and with the loss."""
    drawn = draw(scores, kind, args)
    measured = [simulator.measure(widths) for widths in drawn]
    kl, loss = [m[0] for m in measured], [m[1] or 0.0 for m in measured]
    print(f"\n{kind}: {len(drawn)} configurations, KL {min(kl):.3g}..{max(kl):.3g}")
    print(f"{'metric':24s} {'rho KL':>7s} {'rho loss':>8s}  predicted/KL", flush=True)
    rows = {}
    for name, predict in told.items():
        predicted = [predict(widths) for widths in drawn]
        rows[name] = [spearman(predicted, kl), spearman(predicted, loss)]
        ratio = float(np.median(np.array(predicted) / np.array(kl)))
        print(f"{name:24s} {rows[name][0]:7.3f} {rows[name][1]:8.3f}  {ratio:.3g}", flush=True)
    return {"configurations": len(drawn), "kl": kl, "loss": loss, "rho": rows}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--model", help="architecture or module:factory")
    parser.add_argument("--data")
    parser.add_argument("--data-root")
    parser.add_argument("--normalize")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--metric", nargs="+", choices=METRICS, default=list(METRICS))
    parser.add_argument("--rounding", choices=("nearest", "feedback"), default="nearest")
    parser.add_argument("--policies", type=int, default=100)
    parser.add_argument("--effective-bits", type=float, default=4.8)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    qg, train, test = load(args)
    told, seconds, scores = predictors(qg, train, args)
    noise = perturb(
        qg, train[0], weight_bits=(16, 8, 4), activation_bits=(8, 4), rounding=args.rounding
    )
    simulator = Simulator(noise, *test)
    report: dict[str, Any] = {
        "checkpoint": args.checkpoint.name,
        "machine": this_cpu().name,
        "torch": torch.__version__,
        "samples": len(train[0]),
        "test": len(test[0]),
        "seed": args.seed,
        "cpu_s": seconds,
    }
    for kind in args.kind:
        report[kind] = judge(kind, told, scores, simulator, args)
        if args.out:
            write_json(args.out, json.loads(json.dumps(report)))


if __name__ == "__main__":
    main()
