"""How well a latency profile predicts: mixed policies of random widths, predicted and measured.

    MPQ_DATA=... python benchmarks/prediction.py [--models resnet18 ...] [--policies 6]

The policies keep a random share of the layers at 16 bits, the others at 8 or 4; one has 8 and 4
bits only. Milliseconds are CPU time of one thread (`benchmarks/latency.py`).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path

import torch
from latency import SIDES, images, network

from mpq.export import to_onnx
from mpq.export.profile import profile
from mpq.graph.passes import prepare, to_float
from mpq.pipeline.profiling import check
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.spec import activation_spec, weight_spec


def policy(names: list[str], share: float, seed: int) -> Policy:
    """A random policy with that share of 16-bit layers, in runs of one to four layers."""
    rng, entries, wide = random.Random(seed), [], False
    left = 0
    for name in names:
        if left == 0:
            wide, left = rng.random() < share, rng.randint(1, 4)
        left -= 1
        bits = 16 if wide else rng.choice((8, 4))
        spec = activation_spec(16 if wide else 8)
        entries.append(LayerPolicy(name=name, weight=weight_spec(bits), activation=spec))
    return Policy().with_layers(*entries)


def main() -> None:
    """Print predicted and measured milliseconds of each policy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet18"], choices=list(SIDES))
    parser.add_argument("--policies", type=int, default=6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.models:
        graph = to_float(network(name), images(name, 2))
        found = profile(graph)
        errors = []
        for seed in range(options.policies):
            share = seed / max(options.policies - 1, 1)
            chosen = policy(list(graph.layers), share, seed)
            quantized = prepare(graph, chosen)
            calibrate(quantized, images(name, 2), method="minmax")
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "m.onnx"
                to_onnx(quantized, file, allow_float_fallback=True)
                result = check(found, file)
            wide = sum(e.weight == weight_spec(16) for e in chosen.layers)
            errors.append(abs(result.error))
            print(
                f"{name}: {wide} of {len(graph.layers)} layers at 16 bits: predicted "
                f"{result.predicted_ms:.3f} ms, measured {result.measured_ms:.3f} ms, "
                f"{result.error:+.1f} %",
                flush=True,
            )
        print(f"{name}: mean error {sum(errors) / len(errors):.1f} %, greatest {max(errors):.1f} %")


if __name__ == "__main__":
    main()
