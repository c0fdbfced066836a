"""Networks of many packages, from random weights to a verified file: what comes through, and how.

Each network of `networks.py` is captured, scored on noise, given 6 effective bits of 8 and 4,
quantized without training, exported, certified and verified. Each runs in a process of its own
under a limit of memory and time, one thread, those with the fewest parameters first; a line of JSON
is appended per network, and what is there already is not run again.

    python benchmarks/coverage.py [--only GROUP ...] [--limit MINUTES] [--again]
    python benchmarks/coverage.py --table > docs/coverage.md

Beside the project it needs timm, transformers, segmentation-models-pytorch, ultralytics and
facenet-pytorch, the last two installed with `--no-deps`; what is missing is left out.
`--more FILE.py` adds networks: a dict `NETWORKS` of names to functions that make a `Network`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import runpy
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from coverage_table import group_of, rows, table
from networks import NETWORKS
from torch import Tensor, nn

from mpq import Constraints, Scoring, Search, build_policy, prepare, quantize_graph, score_layers
from mpq import to_float as to_float_graph
from mpq.allocator import keep_freed
from mpq.calls import Inputs, flat, leaves, take
from mpq.capture.capture import capture
from mpq.capture.network import Network
from mpq.checkpoint import weights_hash
from mpq.errors import MpqError
from mpq.export import to_onnx
from mpq.export.exact import ExactReport, verify_exact
from mpq.graph.ir import QuantGraph
from mpq.hooks import hooked
from mpq.outputs import settle
from mpq.pipeline.sizing import sized
from mpq.quant.operation import LAYERS

IMAGES, VERIFIED = 8, 4
EFFECTIVE_BITS = 6
SHIFT = 0.3
"""Mean of the batch norms' shifts: most values pass the ReLU, as in trained networks."""
Row = dict[str, Any]


def network(name: str) -> Network:
    """A network in eval mode on noise, whose batch norms hold the statistics of what they see."""
    torch.manual_seed(0)
    made = NETWORKS[name]()
    made.module.eval()
    more = made.map(_more)
    made = more if _runs(more) else made
    seen: set[str] = set()
    for parameter in made.module.parameters():
        known = weights_hash({"": parameter})
        alike = parameter.min() == parameter.max() or known in seen
        seen.add(known)
        if parameter.is_floating_point() and alike:  # zeros, ones, unit matrices: before training
            parameter.data += 0.02 * torch.randn_like(parameter)
    norms = [m for m in made.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.2, 0.6)  # branches smaller than the trunk
            nn.init.normal_(norm.bias, SHIFT, 0.1)
        norm.momentum = None  # the plain average of what is seen
    for norm in norms:
        norm.train()
    _runs(made)
    made.module.eval()
    return made


@torch.no_grad()
def _runs(made: Network) -> bool:
    """Whether a network takes the call; a list of pictures has no samples to make more of."""
    try:
        made.module(*made.args, **made.kwargs)
    except Exception:  # networks of others raise anything
        return False
    return True


def _more(tensor: Tensor) -> Tensor:
    """As many samples as are looked at, of noise where that has a meaning."""
    if tensor.is_floating_point():
        return torch.rand(IMAGES, *tensor.shape[1:])
    return tensor[torch.arange(IMAGES) % len(tensor)]


def measure(name: str, path: Path) -> Row:
    """The line of one network: as far as it comes, and what stops it."""
    begin, row = time.process_time(), {"network": name, "captured": False, "verified": False}
    try:
        made = network(name)
        row["params"] = sum(p.numel() for p in made.module.parameters())
        _through(made, path, row)
    except ImportError as error:
        row["missing"] = str(error)
    except Exception as error:  # networks of others raise anything
        known = isinstance(error, MpqError)
        row["reason"] = str(error)[:400] if known else f"raw {type(error).__name__}: {error}"[:400]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    return row | {"seconds": round(time.process_time() - begin, 1), "peak_mb": round(peak)}


def _through(made: Network, path: Path, row: Row) -> None:
    """All stages, each adding what it found to the row."""
    found = capture(made)
    row["captured"] = not found.islands
    if found.islands:
        row["islands"] = found.islands
    images = made.example
    graph = to_float_graph(made.module, made)
    graph.outputs = settle(graph.outputs, _quantities(graph))
    row["layers"] = len(graph.layers)
    scores = score_layers(graph, images, how=Scoring(batch=IMAGES))
    search = sized(Search(scores), graph, lambda widest: build_policy(widest, scores))
    chosen = search.allocate(Constraints(effective_bits=EFFECTIVE_BITS))
    row["predicted"] = chosen.bytes
    quantized = prepare(graph, build_policy(chosen, search.scores))
    row["could"] = _could(made, quantized)
    quantize_graph(quantized, images, method="minmax", effort="fast")
    _export(quantized, path, take(images, slice(VERIFIED)), row)


def _quantities(graph: QuantGraph) -> dict[str, str]:
    """Maps and sequences of logits as quantities: untrained ones choose nothing but ties."""
    kinds = {name: output.kind for name, output in graph.outputs.items()}
    return {name: "regression" for name, kind in kinds.items() if kind in ("places", "sequence")}


def _could(made: Network, graph: QuantGraph) -> int:
    """Conv and Linear layers that decide an answer and that the target can run as integers.

    Those of the network that are no layers of the graph count as such.
    """
    called: dict[str, Any] = {}
    names: dict[nn.Module, str] = {module: name for name, module in made.module.named_modules()}
    with hooked(
        module.register_forward_hook(lambda one, *_: called.setdefault(names[one], one))
        for module in names
        if isinstance(module, LAYERS)
    ):
        _runs(made)
    lost = [called[name] for name in called if name not in graph.layers]
    planned = sum(plan.support.integer for plan in graph.plans.values())
    return planned + sum(_decides(layer, made) for layer in lost)


@torch.no_grad()
def _decides(layer: nn.Module, made: Network) -> bool:
    """Whether the network answers otherwise without a layer's weights."""

    def answers() -> list[Tensor]:
        again = made.map(Tensor.clone)
        return list(leaves(made.module(*again.args, **again.kwargs)).values())

    weight, before = dict(layer.named_parameters()).get("weight"), answers()
    if weight is None:  # it is computed
        return True
    kept = weight.clone()
    weight.zero_()
    after = answers()
    weight.copy_(kept)
    return not all(map(torch.equal, before, after))


def _export(graph: QuantGraph, path: Path, images: Inputs, row: Row) -> None:
    """The file; one that does not answer as the simulation is written all the same, and told so."""
    try:
        made = to_onnx(graph, path, images=images)
    except MpqError as error:
        if "does not answer" not in str(error):
            raise
        row["reason"] = str(error)[:600]
        made = to_onnx(graph, path)
        if "no layer alone" in row["reason"]:
            feed = [tensor.numpy() for tensor in flat(graph.module, images)]
            row["exact"] = _exact(verify_exact(path, feed))
    row["written"] = made.bytes
    row["integer"] = sum(layer.integer for layer in made.certificate.layers)
    row["integer_macs"] = round(made.certificate.integer_macs_fraction, 5)
    agrees = made.verification is not None and not made.verification.failures()
    row["verified"] = agrees or row.get("exact", {}).get("differ") == 0
    if made.verification is not None:
        row["agreement"], row["sqnr_db"] = made.verification.agreement, made.verification.sqnr_db
        row["own_step"] = made.verification.max_own_step


def _exact(report: ExactReport) -> dict[str, int]:
    """How many values of integer kernels were predicted bit for bit, and how many were not."""
    known = [node for node in report.nodes if node.mismatches is not None]
    differ = sum(node.mismatches or 0 for node in known) + (not report.same_output)
    return {"nodes": len(known), "values": sum(node.elements for node in known), "differ": differ}


# -- running ---------------------------------------------------------------------------------------


def by_size(names: list[str], sizes: Path) -> list[str]:
    """Names by number of parameters, made without weights; kept, as it takes minutes."""
    known: dict[str, int] = json.loads(sizes.read_text()) if sizes.is_file() else {}
    for name in [n for n in names if n not in known]:
        try:
            with torch.device("meta"):
                known[name] = sum(p.numel() for p in NETWORKS[name]().module.parameters())
        except Exception:  # it cannot be made so: neither small nor large
            known[name] = 20_000_000
    sizes.write_text(json.dumps(known))
    return sorted(names, key=lambda name: known[name])


def run_all(
    out: Path, only: list[str], *, again: bool, limits: dict[str, float], more: Any
) -> None:
    """Measure what is not in the rows yet, or did not come through."""
    out.parent.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * limits["limit"]
    done = {n for n, row in rows(out).items() if row["verified"] or not again}
    names = [
        n for n in NETWORKS if n not in done and (not only or group_of(n) in only or n in only)
    ]
    for name in by_size(names, out.with_suffix(".sizes.json")):
        line = json.dumps(_in_a_process(name, limits, more))
        with out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)
        if time.monotonic() > end:
            break


def _in_a_process(name: str, limits: dict[str, float], more: Any) -> Row:
    def limit() -> None:
        size = int(limits["memory_gb"] * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    command = [sys.executable, __file__, "--measure", name, *(("--more", more) if more else ())]
    row: Row = {"network": name, "captured": False, "verified": False}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60 * limits["minutes"],
            preexec_fn=limit,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )
    except subprocess.TimeoutExpired:
        return row | {"reason": f"more than {limits['minutes']:g} minutes"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return row | {"reason": f"status {done.returncode}: {last[:300]}"}


# -- command ---------------------------------------------------------------------------------------


def _add(path: str | None) -> None:
    if path:
        sys.path.insert(0, str(Path(path).resolve().parent))
        NETWORKS.update(runpy.run_path(path)["NETWORKS"])


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/coverage.jsonl"))
    parser.add_argument("--only", nargs="*", default=[], metavar="GROUP", help="groups or networks")
    parser.add_argument("--again", action="store_true", help="run again what was not verified")
    parser.add_argument("--limit", type=float, default=1e6, metavar="MINUTES", help="of all")
    parser.add_argument("--minutes", type=float, default=15.0, help="of one network")
    parser.add_argument("--memory-gb", type=float, default=8.0)
    parser.add_argument("--more", metavar="FILE", help="a Python file with other networks")
    parser.add_argument("--table", action="store_true", help="print the table of the rows")
    parser.add_argument("--measure", metavar="NETWORK", help=argparse.SUPPRESS)
    args = parser.parse_args()
    _add(args.more)
    if args.measure:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.measure, Path(folder) / "model.onnx")))
    elif args.table:
        print(table(rows(args.out), list(NETWORKS)), end="")
    else:
        limits = {"limit": args.limit, "minutes": args.minutes, "memory_gb": args.memory_gb}
        run_all(args.out, args.only, again=args.again, limits=limits, more=args.more)


if __name__ == "__main__":
    keep_freed()  # as mpq's commands do
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
