"""The speed table: float, mpq at 8 and at 8/4 bits, onnxruntime's int8, in one interleaved run.

Torchvision's networks have random weights (speed does not depend on them); ResNet-20 is the
checkpoint. The mixed policy gives 4 bits to the layers with the most weights until the mean is 4.8
bits. All files of one network run in turn, round after round, at onnxruntime's default options; the
whole is repeated in fresh sessions, because where memory lands changes a session's speed by some
percent. Milliseconds are CPU time of the one thread that runs, so that what else the machine does
counts as little as possible; on an idle machine it is wall time, which they are on more threads:
there each waits until the threads of the one before no longer spin, and runs once to wake its own.

    MPQ_DATA=... python benchmarks/latency.py --out runs/latency [--models M ...] [--openvino]
        [--batch 16] [--threads 2]

With `--int16` both forms of 16-bit layers take their turns, every layer in that form. With
`--openvino` its own int8 form takes its turn too, and milliseconds are CPU time of the whole
process, because OpenVINO may run on a thread of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino_peer
import torch
from common import setting
from numpy.typing import NDArray
from torch import nn

from mpq import zoo
from mpq.checkpoint import load_model
from mpq.cpu import this_cpu
from mpq.export import float_to_onnx, peers, runtime, to_onnx
from mpq.export.bench import interleave, runner
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare, to_float
from mpq.limits import limited
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.spec import weight_spec
from mpq.wide import INT16_FORMS, take_form

SIDES = {
    "resnet20": 32,
    "resnet18": 224,
    "mobilenet_v2": 224,
    "resnet50": 224,
    "efficientnet_b0": 224,
    "mobilenet_v3_large": 224,
    "regnet_y_400mf": 224,
    "regnet_x_400mf": 224,
    "vit_b_16": 224,
    "timm:efficientnet_lite0": 224,
}
ROWS = Path(__file__).parent / "results" / "rows" / "latency.jsonl"
FILES = ("float.onnx", "mpq-w8a8.onnx", "mpq-8-4.onnx", "ort-static.onnx")
WIDE = ("mpq-16-fast.onnx", "mpq-16-exact.onnx")
OPENVINO = "openvino-int8-{}.xml"
MEAN_BITS = 4.8
CALIBRATION = 4


def network(name: str) -> nn.Module:
    """The checkpoint of ResNet-20; else random weights, batch norms fit to noise."""
    if name == "resnet20":
        root = Path(os.environ["MPQ_DATA"])
        return load_model(root / "checkpoints" / "resnet20-cifar10.pth").module
    torch.manual_seed(0)
    module = zoo.build(name, 1000)
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # plain averages of the batches seen
    with torch.no_grad():
        module.train()(images(name, 8))
    return module.eval()


def images(name: str, count: int) -> torch.Tensor:
    """Noise of a fixed seed, `[count, 3, side, side]`."""
    side = SIDES[name]
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def mixed(graph: QuantGraph) -> Policy:
    """4 bits for the layers with the most weights, until the mean width is `MEAN_BITS`."""
    layers = sorted(graph.layers.values(), key=lambda layer: -layer.params)
    total, entries = sum(layer.params for layer in layers), []
    bits = 8 * total
    for layer in layers:
        if bits <= MEAN_BITS * total:
            break
        bits -= 4 * layer.params
        entries.append(LayerPolicy(name=layer.name, weight=weight_spec(4)))
    return Policy.uniform(8).with_layers(*entries)


def build(name: str, folder: Path) -> dict[str, Any]:
    """Write the files of one network; what mpq promises is certified while it writes."""
    folder.mkdir(parents=True, exist_ok=True)
    graph, sample = to_float(network(name), images(name, 2)), images(name, CALIBRATION)
    float_to_onnx(graph, folder / "float.onnx")
    facts: dict[str, Any] = {}
    for label, policy in (("mpq-w8a8", Policy.uniform(8)), ("mpq-8-4", mixed(graph))):
        quantized = prepare(graph, policy)
        calibrate(quantized, sample, method="minmax")  # weights: nearest, per channel
        start = time.perf_counter()
        result = to_onnx(quantized, folder / f"{label}.onnx")
        choices = policy.resolve(list(graph.layers))
        stored = sum(
            layer.weight_bytes(choices[n].weight_bits) for n, layer in graph.layers.items()
        )
        facts[label] = {
            "export_s": round(time.perf_counter() - start, 1),
            "weight_bytes": stored,
            "bytes_to_weight_bytes": round(result.bytes / stored, 4),
            "integer_macs_fraction": result.certificate.integer_macs_fraction,
            "boundaries": result.certificate.boundaries,
        }
    peers.onnxruntime_static(folder / "float.onnx", folder / "ort-static.onnx", sample.numpy())
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def add_wide(name: str, folder: Path) -> list[Path]:
    """A network with all layers at 16 bits in either form, written where it is not there."""
    paths = [folder / label for label in WIDE]
    graph = None if all(p.is_file() for p in paths) else to_float(network(name), images(name, 2))
    for path, form in zip(paths, INT16_FORMS, strict=True):
        if graph is not None:
            policy = take_form(Policy.uniform(16), form)  # type: ignore[arg-type]
            quantized = prepare(graph, policy)
            calibrate(quantized, images(name, CALIBRATION), method="minmax")
            to_onnx(quantized, path)
    return paths


def add_openvino(name: str, folder: Path, batch: int) -> Path:
    """OpenVINO's int8 form of a network, made from the float file where it is not there."""
    path = folder / OPENVINO.format(batch)
    if not path.is_file():
        sample = images(name, CALIBRATION).numpy()
        openvino_peer.quantize(folder / "float.onnx", path, sample, batch=batch)
    return path


def one_by_one(runners: Sequence[Callable[[], Any]], runs: int) -> NDArray[np.float64]:
    """Wall seconds `[runners, runs]`, each when the threads of the one before no longer spin."""
    times = np.zeros((len(runners), runs))
    for i in range(runs):
        for k, run in enumerate(runners):
            time.sleep(0.1)
            run()  # wakes its threads
            start = time.perf_counter()
            run()
            times[k, i] = time.perf_counter() - start
    return times


def measure(
    files: Sequence[Path], *, rounds: int, repeats: int, batch: int, threads: int
) -> list[dict[str, Any]]:
    """Milliseconds of a batch and ratios of files that take turns; the first is the reference.

    `ratio` is the median over all rounds of reference/file, `ratio_low` and `ratio_high` the least
    and the greatest of the repeats' medians; `best_ms` is the fastest round.
    """
    times = []
    foreign = [p.suffix == ".xml" for p in files]
    clock = time.process_time if any(foreign) else time.thread_time
    for _ in range(repeats):
        runners = [
            openvino_peer.runner(p, threads=threads)
            if other
            else runner(p, threads=threads, batch=batch)
            for p, other in zip(files, foreign, strict=True)
        ]
        if threads > 1:
            times.append(1e3 * one_by_one(runners, rounds))
        else:
            times.append(1e3 * interleave(runners, runs=rounds, clock=clock))
    whole = np.concatenate(times, axis=1)
    rows = []
    for i, path in enumerate(files):
        medians = [float(np.median(t[0] / t[i])) for t in times]
        rows.append(
            {
                "file": path.stem,
                "bytes": openvino_peer.size(path) if foreign[i] else path.stat().st_size,
                "median_ms": round(float(np.median(whole[i])), 4),
                "best_ms": round(float(whole[i].min()), 4),
                "ratio": round(float(np.median(whole[0] / whole[i])), 3),
                "ratio_low": round(min(medians), 3),
                "ratio_high": round(max(medians), 3),
                "ratio_best": round(float(whole[0].min() / whole[i].min()), 3),
            }
        )
    return rows


def main() -> None:
    """Build what is missing, measure, print a table, write `latency.json`, add rows to `--rows`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/latency"))
    parser.add_argument("--models", nargs="+", default=list(SIDES), choices=list(SIDES))
    parser.add_argument("--rows", type=Path, default=ROWS, help="where each network adds a line")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="above 1: on an idle machine only")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rebuild", action="store_true")
    parser.add_argument("--int16", action="store_true", help="also all layers at 16 bits")
    parser.add_argument("--openvino", action="store_true", help="also OpenVINO's own int8")
    options = parser.parse_args()
    if options.openvino and openvino_peer.missing():
        parser.error(openvino_peer.missing())
    torch.set_num_threads(1)
    table: dict[str, Any] = {
        "cpu": this_cpu().name,
        "versions": {"torch": torch.__version__, "onnxruntime": runtime.version()}
        | (openvino_peer.versions() if options.openvino else {}),
        "rounds": options.rounds * options.repeats,
        "models": {},
    }
    for name in options.models:
        folder = options.out / name.replace(":", "-")
        if options.rebuild or not (folder / "facts.json").is_file():
            build(name, folder)
        facts = json.loads((folder / "facts.json").read_text())
        files = [folder / label for label in FILES]
        if options.int16:
            files += add_wide(name, folder)
        if options.openvino:
            files.append(add_openvino(name, folder, options.batch))
        how = {"batch": options.batch, "threads": options.threads}
        rows = measure(files, rounds=options.rounds, repeats=options.repeats, **how)
        table["models"][name] = [row | facts.get(row["file"], {}) for row in rows]
        line = {"network": name, **how, "rounds": table["rounds"], "files": rows}
        with options.rows.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line | {"setting": setting()}) + "\n")
        for row in rows:
            print(
                f"{name:20} {row['file']:13} {row['bytes']:>11,} {row['median_ms']:9.3f} ms"
                f"  {row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
                f"  best {row['best_ms']:.3f} ms {row['ratio_best']:.2f}x",
                flush=True,
            )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "latency.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    with limited(onnx_mb=4096):  # a ViT takes more than what is read of unknown files
        main()
