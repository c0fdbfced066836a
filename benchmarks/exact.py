"""The integer reference against onnxruntime on whole networks: is every integer tensor predicted?

    MPQ_DATA=... python benchmarks/exact.py runs/latency/*/mpq-*.onnx [--images 2]

Takes any ONNX files, for instance those of `benchmarks/latency.py`; images are noise, seed 0.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np

from mpq.export import runtime
from mpq.export.exact import verify_exact


def main() -> None:
    """Print one line per file; exit with 1 if any differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=2)
    options = parser.parse_args()
    wrong = 0
    for path in options.files:
        takes = runtime.model_input(runtime.session(path))
        shape, rng = takes.shape(takes.batch or options.images), np.random.default_rng(0)
        images = (
            rng.integers(0, 256, shape, np.uint8)
            if takes.integer
            else rng.standard_normal(shape, np.float32)
        )
        report = verify_exact(path, images)
        predicted = [n for n in report.nodes if n.mismatches is not None]
        left = Counter(n.op for n in report.unpredicted())
        values = sum(n.elements for n in predicted)
        print(
            f"{path}: {'exact' if report.exact else 'DIFFERS'}, {len(predicted)} of "
            f"{len(report.nodes)} nodes, {values:,} values; not predicted: {dict(left) or 'none'}"
        )
        for node in report.differing():
            print(f"  {node.op} {node.name}: {node.mismatches:,} differ, by {node.max_step:g}")
        wrong += not report.exact
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
