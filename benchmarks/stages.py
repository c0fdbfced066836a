"""What each stage of a run costs at 224 pixels: CPU seconds, peak memory, and what takes them.

`mpq analyze`, `ptq` at efforts fast and good, and `export` of MobileNetV2 on a folder of images,
one process each, one thread; beside them static quantization by onnxruntime (min-max, percentile)
and, where an environment has them, by NNCF and MCT, on the same images. User and system time of
whole processes, imports included. Weights are random: no cost depends on them.

    python benchmarks/stages.py IMAGES [--count 128] [--rounds 3] [--parts]
        [--peer nncf=ENVIRONMENT/bin/python] [--peer mct=ENVIRONMENT/bin/python]

IMAGES is a folder with a folder per class. `--parts` runs each stage once more under a profiler and
prints the shares of its parts.
"""

from __future__ import annotations

import argparse
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import setting

from mpq import to_float, zoo
from mpq.data import Normalization
from mpq.export import float_to_onnx

HERE = Path(__file__).resolve().parent
ARCH = "mobilenet_v2"
ORT = ("onnxruntime minmax", "onnxruntime percentile")
PARTS = {
    "imports": "<frozen importlib._bootstrap>:_find_and_load",
    "images": "images.py:read",
    "convolutions": "~:<built-in method torch.conv2d>",
    "scores": "score.py:score_layers",
    "ranges": "observe.py:calibrate",
    "equalization": "equalize.py:equalize",
    "weights and biases": "sequential.py:quantize_layers",
    "torch.onnx": "lower.py:_export",
    "verification": "verify.py:verify",
    "accuracy": "evaluate.py:accuracy",
}
"""Cumulative time of functions, by `file:function`; some lie within others."""


def cost(command: list[str], **more: str) -> dict[str, float]:
    """CPU seconds and peak of one process, run to its end."""
    env = os.environ | {"OMP_NUM_THREADS": "1"} | more
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    cpu = used.ru_utime + used.ru_stime
    return {"cpu_s": round(cpu, 1), "peak_mb": round(used.ru_maxrss / 1000)}


def commands(folder: Path, images: Path, count: int) -> dict[str, list[str]]:
    """Mpq's stages, in order; each reads what the one before it wrote."""
    run, many = str(folder / "run"), str(count)
    data = ["--data", str(images), "--normalize", "imagenet"]
    analyze = ["analyze", str(folder / "model.pth"), *data, "-o", run, "--rescore", "--force"]
    return {
        "analyze": [*analyze, "--num-calib", many],
        "ptq fast": ["ptq", run, "--effort", "fast", "--num-calib", many, "--force"],
        "ptq good": ["ptq", run, "--effort", "good", "--num-calib", many, "--force"],
        "export": ["export", run, "--force"],
    }


def prepare(folder: Path, images: Path, count: int) -> None:
    """A checkpoint, its float file, and the images as the peers take them."""
    torch.manual_seed(0)
    model = zoo.build(ARCH, 1000).eval()
    torch.save(model.state_dict(), folder / "model.pth")
    graph = to_float(model, torch.rand(2, *zoo.input_size(ARCH)))
    float_to_onnx(graph, folder / "float.onnx")
    from PIL import Image  # as the peers' users read them

    files = sorted(images.glob("*/*"))[:count]
    side = zoo.input_size(ARCH)[-1]
    pixels = [np.asarray(Image.open(f).convert("RGB").resize((side, side))) for f in files]
    normalized = Normalization.parse("imagenet").apply(np.stack(pixels))
    np.save(folder / "images.npy", normalized)


def parts(command: list[str], folder: Path) -> dict[str, float]:
    """Shares of a stage's CPU time by part, in percent."""
    out = folder / "profile"
    code = (
        "import cProfile, sys, time; from mpq.cli import main; p = cProfile.Profile("
        "time.process_time); sys.argv = ['mpq', *sys.argv[2:]]\n"
        "try: p.runcall(main)\nexcept SystemExit: pass\nfinally: p.dump_stats(out)\n"
    ).replace("dump_stats(out)", f"dump_stats({str(out)!r})")
    cost([sys.executable, "-c", code, "-", *command], MPQ_CACHE=str(folder / "cache"))
    stats = pstats.Stats(str(out))
    found = dict.fromkeys(PARTS, 0.0)
    for (file, _, name), (_, _, _, cumulative, _) in stats.stats.items():  # type: ignore[attr-defined]
        for part, where in PARTS.items():
            if f"{Path(file).name}:{name}" == where:
                found[part] = max(found[part], cumulative)
    whole = stats.total_tt  # type: ignore[attr-defined]
    return {part: round(100 * spent / whole) for part, spent in found.items() if spent > 0.01}


def main() -> None:
    """Measure and print a line of JSON per stage and peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--peer", action="append", default=[], metavar="TOOL=PYTHON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, options.images, options.count)
        stages = commands(folder, options.images, options.count)
        asked = dict(peer.split("=", 1) for peer in options.peer)
        peers = dict.fromkeys(ORT, sys.executable) | asked
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(options.rounds):
            shutil.rmtree(folder / "run", ignore_errors=True)
            for stage, words in stages.items():
                command = [sys.executable, "-m", "mpq", *words]
                rows.setdefault(f"mpq {stage}", []).append(
                    cost(command, MPQ_CACHE=str(folder / "cache"))
                )
            for tool, python in peers.items():
                command = [python, str(HERE / "stages_peers.py"), tool, str(folder)]
                rows.setdefault(tool, []).append(cost(command))
        for stage, seen in rows.items():
            cpu = [row["cpu_s"] for row in seen]
            row = {
                "stage": stage,
                "cpu_s": statistics.median(cpu),
                "cpu_s_range": [min(cpu), max(cpu)],
                "peak_mb": max(row["peak_mb"] for row in seen),
                "images": options.count,
            }
            if options.parts and stage.removeprefix("mpq ") in stages:
                row["parts"] = parts(stages[stage.removeprefix("mpq ")], folder)
            print(json.dumps(row | setting()), flush=True)


if __name__ == "__main__":
    main()
