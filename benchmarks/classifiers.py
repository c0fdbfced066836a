"""Every torchvision classifier through the whole pipeline: what traces, exports, verifies, and how.

For each of the 80 classifiers, with random weights and batch statistics of its own: float ->
post-training quantization (W8A8, and 8/4 mixed) -> one ONNX file -> loaded, certified and verified
in onnxruntime -> timed against the float file, interleaved, one thread, batch 1. A line of JSON per
model is appended to the results, so that an interrupted run goes on where it stopped; each model
runs in a process of its own under a limit of memory and time.

    python benchmarks/classifiers.py --out build/classifiers.jsonl [--only resnet18 vit_b_16]
    python benchmarks/classifiers.py --out build/classifiers.jsonl --table > docs/classifiers.md
    python benchmarks/classifiers.py --out build/chaos.jsonl --shift 0 --only mobilenet_v2
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq import _torchvision
from mpq.errors import MpqError
from mpq.export import float_to_onnx, runtime, to_onnx
from mpq.export.bench import interleave
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare, to_float
from mpq.layers import LayerInfo
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import quantize_graph
from mpq.spec import weight_spec

SIDES = {"inception_v3": 299}
"""Input sides other than 224."""
CALIBRATION, VERIFICATION, ROUNDS = 4, 6, 12
ONE_FILE = 2**31 - 1
SHIFT = 0.3
"""Mean of the batch norms' shifts: most values pass the ReLU, which makes for less chaos."""
_HEAD = """# torchvision's classifiers, from float to a verified file

Random weights, batch norms with statistics of what flows through, and a last layer that tells the
images apart; min-max ranges, rounding to nearest; `8`: W8A8, `mixed`: 4-bit weights but for the
first and last layer and the depthwise ones. *Verified*: the share of images with the class of the
simulation, the largest difference of any quantizer that is given the runtime's own integers before
it (what its layer does alone: a tie that rounds the other way is one step), and the largest at the
end of the chain. The last is a matter of the network: batch norm and ReLU at random weights
amplify noise from layer to layer (Yang et al., "A Mean Field Theory of Batch Normalization",
2019). With shifts of mean 0 (`--shift 0`) mobilenet_v2 W8A8 ends 98 and regnet_y_400mf 177 steps
from where it should be, though no layer alone is more than one step off; with shifts of mean 0.3,
as here, 35 and 28. Size and latency are ratios to the float file; latencies are
CPU time of one thread, batch 1, interleaved (`-`: the machine was too busy to tell). The command is
in `benchmarks/classifiers.py`; it goes on where it stopped.
What comes through of other packages is in coverage.md.
"""


def images(count: int, side: int, seed: int) -> Tensor:
    """Normalized images with structure at several scales, `[count, 3, side, side]`."""
    draw = torch.Generator().manual_seed(seed)
    octaves = [torch.randn(count, 3, n, n, generator=draw) for n in (4, 16, 64)]
    return sum(F.interpolate(o, (side, side), mode="bilinear") for o in octaves) / 3**0.5  # type: ignore[return-value]


def random_network(name: str, side: int, shift: float) -> nn.Module:
    """A classifier with random weights whose batch norms hold statistics of what flows through."""
    torch.manual_seed(0)
    options = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    net: nn.Module = _torchvision.models().get_model(name, weights=None, **options).eval()
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.2, 0.6)  # branches smaller than the trunk, as if trained
        nn.init.normal_(norm.bias, shift, 0.1)
        norm.train()
        norm.momentum = None  # the plain average of what is seen
    with torch.no_grad():
        net(images(CALIBRATION, side, seed=1))
    _tell_apart(net.eval(), images(VERIFICATION, side, seed=2))
    return net


@torch.no_grad()
def _tell_apart(net: nn.Module, batch: Tensor) -> None:
    """Set the last layer as training would: image `k` of the batch belongs to class `k`.

    A random last layer answers all images alike, and which class wins is then decided by noise.
    """
    last = [m for m in net.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(batch)
    handle.remove()
    features = seen[0].flatten(2).mean(2) if seen[0].ndim == 4 else seen[0]
    away = F.normalize(features - features.mean(0))
    shape = (len(batch), *last.weight.shape[1:])
    last.weight.mul_(0.1)[: len(batch)].copy_(away.reshape(shape))
    if last.bias is not None:
        last.bias.zero_()[: len(batch)].copy_(-away @ features.mean(0))


def mixed_policy(layers: dict[str, LayerInfo]) -> Policy:
    """4-bit weights but for the first and last layer and the depthwise ones."""
    names = list(layers)
    inner = [n for n in names[1:-1] if layers[n].kind != "depthwise"]
    return Policy(layers=[LayerPolicy(name=n, weight=weight_spec(4)) for n in inner])


def quantize_and_export(qg: QuantGraph, policy: Policy, path: Path, side: int) -> dict[str, Any]:
    """Quantize, export, certify, verify; what came of it."""
    start = time.perf_counter()
    graph = prepare(qg, policy)
    quantize_graph(graph, images(CALIBRATION, side, seed=1), method="minmax", effort="fast")
    quantized = time.perf_counter()
    row: dict[str, Any] = {"ptq_s": round(quantized - start, 1)}
    try:
        made = to_onnx(graph, path, images=images(VERIFICATION, side, seed=2))
    except MpqError as error:
        row["error"] = str(error)[:600]
        if "does not answer" not in row["error"]:
            return row
        made = to_onnx(graph, path)  # it exports, and is told as not verified
    report, certificate = made.verification, made.certificate
    if report is not None:
        row |= {
            "agreement": report.top1_agreement,
            "own_step": report.max_own_step,
            "max_step": report.max_step,
            "sqnr_db": round(min(report.logits_sqnr_db, 99.0), 1),
        }
    return row | {
        "export_s": round(time.perf_counter() - quantized, 1),
        "bytes": made.bytes,
        "integer_macs": round(certificate.integer_macs_fraction, 5),
        "float_layers": [f"{r.name}: {r.reason}" for r in certificate.layers if not r.integer],
        "boundaries": certificate.boundaries,
    }


def latencies(files: list[Path], side: int) -> list[float]:
    """Median over rounds of the first file's CPU time over each file's, one thread."""
    sessions = [runtime.session(path) for path in files]
    x = images(1, side, seed=3).numpy()
    runners = [lambda s=s: s.run(None, {s.get_inputs()[0].name: x}) for s in sessions]
    times = interleave(runners, runs=ROUNDS, warmup=2, clock=time.thread_time)
    return [round(float(np.median(times[0] / t)), 3) for t in times]


def measure(name: str, shift: float) -> dict[str, Any]:
    """The line of one model."""
    start, side = time.perf_counter(), SIDES.get(name, 224)
    net = random_network(name, side, shift)
    params = sum(p.numel() for p in net.parameters())
    row: dict[str, Any] = {"model": name, "side": side, "params": params, "shift": shift}
    try:
        qg = to_float(net, images(2, side, seed=0))
    except MpqError as error:
        return row | {"traced": False, "error": str(error)[:600]}
    del net
    row |= {"traced": not qg.islands, "layers": len(qg.layers)}
    policies = {"w8a8": Policy.uniform(8, 8), "mixed": mixed_policy(qg.layers)}
    with tempfile.TemporaryDirectory() as folder:
        files = [float_to_onnx(qg, Path(folder) / "float.onnx")]
        row["float_bytes"] = files[0].stat().st_size
        for kind, policy in policies.items():
            path = Path(folder) / f"{kind}.onnx"
            row[kind] = quantize_and_export(qg, policy, path, side)
            if path.is_file():
                files.append(path)
        ratios = dict(zip([p.stem for p in files], latencies(files, side), strict=True))
    for kind in policies:
        if "bytes" in row[kind]:
            row[kind]["size_ratio"] = round(row["float_bytes"] / row[kind]["bytes"], 2)
            row[kind]["latency_ratio"] = ratios[kind]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return row | {"seconds": round(time.perf_counter() - start), "peak_mb": round(peak)}


def by_size() -> dict[str, int]:
    """The classifiers and their parameter counts, smallest first."""
    module = _torchvision.models()
    names = module.list_models(module=module)
    sizes = {n: next(iter(module.get_model_weights(n))).meta["num_params"] for n in names}
    return dict(sorted(sizes.items(), key=lambda item: item[1]))


def run_all(out: Path, names: list[str], shift: float, *, memory_gb: float, minutes: float) -> None:
    """Measure what is not in the results yet."""
    sizes = by_size()
    done = (
        {json.loads(line)["model"] for line in out.read_text().splitlines()}
        if out.exists()
        else set()
    )
    for name in [n for n in sizes if (n in names or not names) and n not in done]:
        if 4 * sizes[name] > ONE_FILE:
            reason = f"{4 * sizes[name] / 1e9:.1f} GB of float weights: one ONNX file holds 2"
            row = {"model": name, "params": sizes[name], "skipped": reason}
        else:
            row = {"params": sizes[name]} | _in_a_process(name, shift, memory_gb, minutes)
        with out.open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def _in_a_process(name: str, shift: float, memory_gb: float, minutes: float) -> dict[str, Any]:
    def limit() -> None:
        size = int(memory_gb * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    command = [sys.executable, __file__, "--measure", name, "--shift", str(shift)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * minutes, preexec_fn=limit
        )
    except subprocess.TimeoutExpired:
        return {"model": name, "skipped": f"more than {minutes:g} minutes"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    if done.returncode == -9 or "MemoryError" in last or "allocate memory" in done.stderr:
        return {"model": name, "skipped": f"more than {memory_gb:g} GB of memory"}
    return {"model": name, "error": f"status {done.returncode}: {last[:600]}"}


def table(out: Path) -> str:
    """The results as Markdown, and which classifiers were not run."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    measured = {row["model"] for row in rows}
    left = [name for name in by_size() if name not in measured]
    rest = f"\nNot run yet, smallest first: {', '.join(left)}.\n" if left else ""
    head = (
        f"{_HEAD}\nonnxruntime {runtime.version()}, torch {torch.__version__}, "
        f"{platform.machine()}; {len(measured)} of 80 measured.\n\n"
        "| model | params (M) | traced | exported | verified: class, steps alone and in all "
        "| integer MACs | boundaries | size ratio 8 / mixed | latency ratio 8 / mixed |\n"
        + "|---" * 9
        + "|\n"
    )
    return head + "".join(_line(row) for row in sorted(rows, key=lambda r: r["model"])) + rest


def _line(row: dict[str, Any]) -> str:
    begin = f"| {row['model']} | {row['params'] / 1e6:.1f} | "
    if "skipped" in row or "error" in row:
        why = f"skipped: {row['skipped']}" if "skipped" in row else row["error"][:80]
        return f"{begin}{why} | | | | | | |\n"
    kinds = [row["w8a8"], row["mixed"]]
    exported = ["yes" if "bytes" in k else f"no: {k['error'][:60]}" for k in kinds]
    verified = [
        f"{k['agreement']:.0%}, {k['own_step']} and {k['max_step']}" if "agreement" in k else "no"
        for k in kinds
    ]

    def both(key: str, form: str) -> str:
        return " / ".join(format(k[key], form) if key in k else "-" for k in kinds)

    return (
        f"{begin}{'yes' if row['traced'] else 'in part'} | {_once(exported)} | {_once(verified)} | "
        f"{both('integer_macs', '.2%')} | {both('boundaries', 'd')} | {both('size_ratio', '.2f')} "
        f"| {both('latency_ratio', '.2f')} |\n"
    )


def _once(texts: list[str]) -> str:
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/classifiers.jsonl"))
    parser.add_argument("--only", nargs="*", default=[], metavar="MODEL")
    parser.add_argument(
        "--shift", type=float, default=SHIFT, metavar="MEAN", help="mean of batch norms' shifts"
    )
    parser.add_argument("--memory-gb", type=float, default=12.0)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    parser.add_argument("--measure", metavar="MODEL", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.shift)))
    elif args.table:
        print(table(args.out), end="")
    else:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        limits = {"memory_gb": args.memory_gb, "minutes": args.minutes}
        run_all(args.out, args.only, args.shift, **limits)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
