"""The ResNet-20 table: CIFAR-10 checkpoint in, measured mixed-precision file out.

Runs the command line as a user would (`analyze`, `ptq`, `export`, `bench --peers`), with the
CPU time of each command; then compares simulation and runtime on all 10,000 test images and repeats
the quantization with other calibration seeds.

    MPQ_DATA=... python benchmarks/resnet20.py --out runs/resnet20 [--seeds 5] [--bits 4.8]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import accuracy_of, answers, setting

from mpq import policies
from mpq.data import load_arrays, open_data
from mpq.files import write_text
from mpq.graph.passes import freeze
from mpq.pipeline.quantizing import load_quantized
from mpq.pipeline.subject import DataSource
from mpq.policy import Policy
from mpq.train.evaluate import predict


def run(*command: str) -> dict[str, float]:
    """Run `mpq ...`; return wall and CPU seconds."""
    print("$ mpq", *command, flush=True)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "mpq", *command])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"mpq {' '.join(command)} failed with status {status}")
    return {
        "wall_s": round(time.perf_counter() - start, 1),
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": round(usage.ru_maxrss / 1000),
    }


def compare(folder: Path) -> dict[str, Any]:
    """Top-1 of the file and its agreement with the simulation, on every test image."""
    found = load_quantized(folder / "ptq.pth", DataSource())
    images, labels = load_arrays(open_data("cifar10").test)
    simulated = (
        predict(freeze(found.graph).module, images, found.subject.normalize).argmax(1).numpy()
    )
    answered = answers(folder / "model.onnx", images, found.subject.normalize)
    return accuracy_of(answered, labels) | {
        "agreement": round(100 * float((answered == simulated).mean()), 2),
        "bytes": (folder / "model.onnx").stat().st_size,
    }


def uniform(source: Path, name: str, folder: Path) -> None:
    """Write a ready-made uniform policy for the network of another policy."""
    named = Policy.load(source)
    policy = policies.load(name).replace(model=named.model, data=named.data)
    write_text(folder / "policy.yaml", policy.to_yaml())


def main() -> None:
    """Run the benchmark and print its table as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/resnet20"))
    parser.add_argument("--bits", default="4.8", help="effective weight bits")
    parser.add_argument("--seeds", type=int, default=1, help="calibration seeds")
    parser.add_argument("--effort", default="good")
    options = parser.parse_args()
    checkpoint = Path(os.environ["MPQ_DATA"]) / "checkpoints" / "resnet20-cifar10.pth"
    out = options.out
    costs = {
        "analyze": run(
            "analyze", str(checkpoint), "--data", "cifar10", "--normalize", "imagenet",
            "--effective-bits", options.bits, "-o", str(out), "--force",
        )
    }  # fmt: skip
    results = []
    for seed in range(options.seeds):
        policy = str(out / "policy.yaml")
        folder = out if seed == 0 else out / f"seed-{seed}"
        told = ("--seed", str(seed), "--force", "-o", str(folder))
        ptq = run("ptq", "--policy", policy, "--effort", options.effort, *told)
        export = run("export", str(folder / "ptq.pth"), "--force")
        if seed == 0:
            costs |= {"ptq": ptq, "export": export}
        results.append({"seed": seed, **compare(folder)})
        print(results[-1], flush=True)
    found = [str(out / "model.onnx")]
    for name in ("w8a8", "w4a8"):
        folder = out / name
        uniform(out / "policy.yaml", name, folder)
        run("ptq", "--policy", str(folder / "policy.yaml"), "--force")
        run("export", str(folder / "ptq.pth"), "--force")
        results.append({"policy": name, **compare(folder)})
        found.append(str(folder / "model.onnx"))
    told = ("--float", str(out / "float.onnx"), "--peers", "-o", str(out))
    costs["bench"] = run("bench", *found, *told)
    top1 = np.array([r["top1"] for r in results if "seed" in r])
    certificate = json.loads((out / "certificate.json").read_text())
    rows = [json.loads(line) for line in (out / "bench.jsonl").read_text().splitlines()]
    summary = {
        "setting": setting(),
        "costs": costs,
        "results": results,
        "top1_mean": round(float(top1.mean()), 2),
        "top1_std": round(float(top1.std()), 2),
        "integer_macs_fraction": certificate["integer_macs_fraction"],
        "executed": sorted({r["executed"] for r in certificate["layers"]}),
        "bench": rows,
    }
    text = json.dumps(summary, indent=1)
    (out / "resnet20.json").write_text(text + "\n")
    print(text)


main()
