"""One file in several runtimes on many CIFAR-10 test images: class, accuracy, layers, speed.

`python benchmarks/one_file.py RUN [--images 2000] [--emulated 64]` takes model.onnx and float.onnx
of a run whose file `mpq export` has proven, so that the answers of onnxruntime here stand for the
simulation. Emulated CPUs take fewer images. Rows are added to `rows/one_file.jsonl`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mpq.data import Normalization, open_data, sample_indices
from mpq.export import foreign, runtime
from mpq.export.fileinfo import file_info
from mpq.export.foreign import Foreign, Job
from mpq.export.portability import RUNS, _row

ROWS = Path(__file__).resolve().parent / "results" / "rows" / "one_file.jsonl"
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def measure(there: Foreign, run: Path, images: Any, labels: Any, wanted: Any) -> dict[str, Any]:
    """The file of a run in one runtime: `wanted` are the classes that the simulation gives."""
    name = runtime.model_input(runtime.session(run / "model.onnx")).name
    timed = 0 if there.emulated else 5 * RUNS
    done = foreign.run(there, run / "model.onnx", Job({name: images}, 50, runs=timed))
    seconds = None
    if timed:
        plain = foreign.run(there, run / "float.onnx", Job({name: images[:1]}, 1, runs=timed))
        seconds = float(np.median(plain.seconds))
    best = next(iter(done.outputs.values())).reshape(len(images), -1).argmax(1)
    found = asdict(_row(there, run / "model.onnx", done, seconds))
    kept = ("runtime", "version", "integer", "layers", "ms", "ratio")
    return {key: found[key] for key in kept} | {
        "n": len(images),
        "same_class": round(100 * float((best == wanted[: len(best)]).mean()), 2),
        "top1": round(100 * float((best == labels).mean()), 2),
    }


def main() -> None:
    """Measure in every runtime that is installed, keep and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--emulated", type=int, default=64)
    parser.add_argument("--runtime", nargs="*", default=[])
    asked = parser.parse_args()
    split = open_data("cifar10", root=DATA).compared
    chosen = sample_indices(split, asked.images, 0)
    norm = Normalization.parse(file_info(asked.run / "model.onnx").normalize or "none")
    images, labels = norm.apply(split.read(chosen)), np.asarray(split.labels)[chosen]
    answers = {f: runtime.run(runtime.session(asked.run / f), images).argmax(1)
               for f in ("model.onnx", "float.onnx")}  # fmt: skip
    float_top1 = round(100 * float((answers["float.onnx"] == labels).mean()), 2)
    with ROWS.open("a", encoding="utf-8") as out:
        for there in foreign.chosen(tuple(asked.runtime)):
            if not there.there:
                continue
            n = asked.emulated if there.emulated else asked.images
            row = measure(there, asked.run, images[:n], labels[:n], answers["model.onnx"])
            line = json.dumps({"bytes": (asked.run / "model.onnx").stat().st_size, **row,
                               "float_top1": float_top1})  # fmt: skip
            out.write(line + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
