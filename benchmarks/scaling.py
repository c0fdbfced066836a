"""How the cost of scoring and of search grows with layers and with widths.

    python benchmarks/scaling.py --depths 20 56 110 --widths 2 4 7 --images 64

Scoring: ResNets for CIFAR of rising depth with random weights, each in a process of its own, CPU
time and peak memory beside those of a process that only loads the network. Search: the scores of
those networks, then made-up networks of up to 1,000 layers under three constraints. The exponent is
the slope of log(time) over log(size), by least squares.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from mpq.cpu import this_cpu

WIDTHS = (8, 4, 2, 6, 3, 5, 16)
"""The first so many are the choices."""


def exponent(sizes: list[float], values: list[float]) -> float:
    """Slope of the line through the logarithms."""
    if len(sizes) < 2:
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def peak_mb() -> float:
    """Peak memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def scored(depth: int, widths: int, images: int, size: int, arch: str | None) -> dict[str, Any]:
    """Score one network in this process."""
    import torch

    from mpq import zoo
    from mpq.analyze import Scoring, Search, score_layers
    from mpq.graph.passes import to_float
    from mpq.policy import Constraints
    from mpq.zoo.resnet import cifar_resnet

    torch.manual_seed(0)
    net = zoo.build(arch, 1000) if arch else cifar_resnet(depth, shortcut="pad", classes=10)
    batch = torch.randn(images, 3, size, size)
    _normalize_by(net, batch[:16])
    graph = to_float(net.eval(), batch[:2])
    before, start, wall = peak_mb(), time.process_time(), time.perf_counter()
    scores = score_layers(graph, batch, how=Scoring(bits=WIDTHS[:widths]))
    spent = time.process_time() - start
    start = time.process_time()
    Search(scores).allocate(Constraints(effective_bits=4.8))
    return {
        "network": arch or f"resnet{depth}",
        "layers": len(graph.layers),
        "widths": widths,
        "images": images,
        "scoring_cpu_s": round(spent, 2),
        "search_cpu_s": round(time.process_time() - start, 3),
        "wall_s": round(time.perf_counter() - wall, 2),
        "peak_mb": round(peak_mb()),
        "loaded_mb": round(before),
    }


def _normalize_by(net: Any, batch: Any) -> None:
    """Give batch norms the statistics of a batch: without, a thousand random layers overflow."""
    import torch

    for module in net.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # the plain mean of what was seen
    with torch.no_grad():
        net.train()(batch)


def made_up(layers: int, widths: int, seed: int = 0) -> Any:
    """A chain of layers of many sizes with scores that fall with the width."""
    from mpq.analyze.sensitivity import Row, Sensitivity
    from mpq.layers import LayerInfo

    rng = random.Random(seed)
    infos, rows = [], []
    for i in range(layers):
        params = 4 * int(np.exp(rng.uniform(5, 13)))
        macs = int(np.exp(rng.uniform(11, 18)))
        infos.append(LayerInfo(f"l{i}", "linear", (4, params // 4), 4, True, macs, 100, 4))
        base = 10 ** rng.uniform(-5, -1)
        for bits in WIDTHS[:widths]:
            score = base * 4.0 ** (4 - bits) * rng.uniform(0.7, 1.3)
            rows.append(Row(f"l{i}", "weight", bits, score))
        rows += [Row(f"l{i}", "activation", b, base * 4.0**-b) for b in (16, 8)]
    return Sensitivity(tuple(rows), tuple(infos), (), "made up", 0, seed, "")


def searched(layers: int, widths: int) -> dict[str, Any]:
    """Search a made-up network under three constraints."""
    from mpq.analyze import Search, candidates, cost
    from mpq.layers import Widths
    from mpq.policy import Constraints
    from mpq.targets import ONNXRUNTIME_CPU

    scores = made_up(layers, widths)
    middle: dict[str, Widths] = {info.name: (5, 8) for info in scores.layers}
    constraints = Constraints(
        effective_bits=5.0,
        max_size_mb=0.99
        * cost.predicted_bytes(scores.layers, middle, ONNXRUNTIME_CPU, scores.besides)
        / 1e6,
        max_bops=0.9 * cost.bitops(scores.layers, middle, scores.besides) / 1e9,
    )
    start, wall = time.process_time(), time.perf_counter()
    found = Search(scores, widths=candidates(WIDTHS[:widths])).allocate(constraints)
    return {
        "layers": layers,
        "widths": widths,
        "cpu_s": round(time.process_time() - start, 3),
        "wall_s": round(time.perf_counter() - wall, 3),
        "status": found.status,
        "gap": found.gap,
    }


def child(*argv: str) -> dict[str, Any]:
    """Run one case in a process of its own, so that its peak memory is its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", *argv], capture_output=True, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(found, flush=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", type=int, nargs="*", default=[20, 56, 110, 290, 1202])
    parser.add_argument("--widths", type=int, nargs="*", default=[2, 4, 7])
    parser.add_argument("--layers", type=int, nargs="*", default=[20, 100, 300, 1000])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--large", nargs="*", default=[], help="torchvision networks, at 224")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=6, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        kind, depth, widths, images, size, arch = args.case
        if kind == "score":
            found = scored(int(depth), int(widths), int(images), int(size), arch or None)
        else:
            found = searched(int(depth), int(widths))
        print(json.dumps(found))
        return
    images, most = str(args.images), max(args.widths)
    report: dict[str, Any] = {"machine": this_cpu().name, "cores": os.cpu_count()}
    by_depth = [child("score", str(d), "2", images, "32", "") for d in args.depths]
    by_width = [child("score", "20", str(w), images, "32", "") for w in args.widths]
    layers = [child("search", str(n), str(most), "0", "0", "") for n in args.layers]
    widths = [child("search", "100", str(w), "0", "0", "") for w in args.widths]
    report["large"] = [child("score", "0", "2", "64", "224", name) for name in args.large]
    for name, rows, over, what in (
        ("scoring over layers", by_depth, "layers", "scoring_cpu_s"),
        ("peak memory over layers", by_depth, "layers", "peak_mb"),
        ("scoring over widths", by_width, "widths", "scoring_cpu_s"),
        ("search over layers", layers, "layers", "cpu_s"),
        ("search over widths", widths, "widths", "cpu_s"),
    ):
        slope = exponent([r[over] for r in rows], [r[what] for r in rows])
        report[name] = {"exponent": slope, "rows": rows}
        print(f"{name}: exponent {slope:.2f}")
    if args.out:
        args.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
