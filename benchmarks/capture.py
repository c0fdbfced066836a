"""Networks as people write them, captured: by symbolic tracing, by recording, through all passes.

Each network of `networks.py` is made with random weights, traced by `torch.fx.symbolic_trace`, and
captured by `mpq.capture`; both graphs are replayed on another batch size with noise. One that takes
one tensor goes through the passes to a float graph, and prepared at 8 bits it must run. A line of
JSON per network is appended, so that an interrupted run goes on where it stopped.

    python benchmarks/capture.py --out build/capture.jsonl [--only timm:resnet18d]
    python benchmarks/capture.py --out build/capture.jsonl --table > docs/capture.md

Beside the project it needs timm, transformers, segmentation-models-pytorch, ultralytics and
facenet-pytorch, the last two installed with `--no-deps`; what is missing is left out.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from networks import NETWORKS
from torch import Tensor, fx, nn

from mpq.capture.capture import capture
from mpq.capture.fresh import fresh
from mpq.capture.network import Network
from mpq.capture.replay import replay
from mpq.errors import MpqError
from mpq.graph.passes import prepare, to_float
from mpq.policy import Policy
from mpq.quant.operation import LAYERS

_HEAD = """# What can be captured

Networks with random weights, made by `benchmarks/capture.py`. *Traced*: `torch.fx.symbolic_trace`
takes the network, and the graph answers as the network does on another batch size with noise.
*Recorded*: the same of `mpq.capture`. *Passes*: of those that take one tensor, how many become a
float graph that answers as the network does and run when prepared at 8 bits. *Layers*: Conv and
Linear modules that are nodes of the graph, of those that the network has. CPU seconds of one thread
for recording and replay.

"""


def network(name: str) -> Network:
    """A network in eval mode, whose batch norms do more than nothing."""
    torch.manual_seed(0)
    made: Network = NETWORKS[name]()
    made.module.eval()
    for norm in made.module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_mean is not None:
            norm.running_mean.uniform_(-0.05, 0.05)
            norm.running_var.uniform_(0.8, 1.2)
    return made


def attempt(step: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step gives, or why it gives nothing."""
    begin = time.process_time()
    try:
        found = step()
    except Exception as error:  # networks of others raise anything
        found = {"error": f"{type(error).__name__}: {error}"[:300]}
        if not isinstance(error, MpqError):
            found["raw"] = True
    return found | {"seconds": round(time.process_time() - begin, 2)}


def traced(made: Network) -> dict[str, Any]:
    """Symbolic tracing."""
    own = Network(fresh(made.module), made.args, made.kwargs)
    given = {k: v for k, v in made.constants.items() if isinstance(v, (bool, int, float))}
    graph = fx.symbolic_trace(fresh(made.module), concrete_args=given or None)
    wrong = replay(own, graph)
    return {"error": wrong} if wrong else {}


def recorded(made: Network) -> dict[str, Any]:
    """`mpq.capture`."""
    captured = capture(made)
    called = {n.target for n in captured.module.graph.nodes if n.op == "call_module"}
    layers = [n for n, m in made.module.named_modules() if isinstance(m, LAYERS)]
    return {
        "nodes": len(captured.module.graph.nodes),
        "islands": captured.islands,
        "layers": len(layers),
        "called": len(called.intersection(layers)),
    }


def passed(made: Network) -> dict[str, Any]:
    """The float graph, and the prepared one."""
    graph = to_float(made.module, made.args[0])
    with torch.no_grad():
        prepare(graph, Policy.uniform(8)).module(made.args[0])
    return {"layers": len(graph.layers)}


def measure(name: str) -> dict[str, Any]:
    """The line of one network."""
    row: dict[str, Any] = {"network": name}
    try:
        made = network(name)
    except ImportError as error:
        return row | {"missing": str(error)}
    row["traced"] = attempt(lambda: traced(made))
    row["recorded"] = attempt(lambda: recorded(made))
    if len(made.inputs) == 1 and isinstance(made.args[0], Tensor):
        row["passed"] = attempt(lambda: passed(made))
    return row


def run_all(out: Path, names: list[str]) -> None:
    """Measure what is not in the results yet."""
    lines = out.read_text().splitlines() if out.exists() else []
    done = {json.loads(line)["network"] for line in lines}
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in [n for n in NETWORKS if (n in names or not names) and n not in done]:
        line = json.dumps(measure(name))
        with out.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def table(out: Path) -> str:
    """The results as Markdown: a line a group, then what was not taken and why."""
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    rows = [row for row in rows if "missing" not in row]
    groups = {group: [r for r in rows if r["network"].split(":")[0] == group]
              for group in dict.fromkeys(r["network"].split(":")[0] for r in rows)}  # fmt: skip
    lines = ["| group | networks | traced | recorded | passes | layers | s, median and most |"]
    lines += ["|---" * 7 + "|", *(_line(group, of) for group, of in groups.items())]
    lines += [_line("all", rows), "", "What was not taken whole:", ""]
    told = _refusals(rows) or ["nothing"]
    measured = f"torch {torch.__version__}; {len(rows)} of {len(NETWORKS)} networks measured.\n\n"
    return _HEAD + measured + "\n".join([*lines, *told]) + "\n"


def _line(group: str, rows: list[dict[str, Any]]) -> str:
    def right(key: str) -> str:
        tried = [row[key] for row in rows if key in row]
        return f"{sum('error' not in t for t in tried)} of {len(tried)}"

    good = [row["recorded"] for row in rows if "error" not in row["recorded"]]
    seconds = sorted(t["seconds"] for t in good)
    layers = f"{sum(t['called'] for t in good)} of {sum(t['layers'] for t in good)}"
    took = f"{seconds[len(seconds) // 2]} and {seconds[-1]}" if seconds else "-"
    told = (right("traced"), right("recorded"), right("passed"), layers, took)
    return f"| {group} | {len(rows)} | {' | '.join(told)} |"


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    told = []
    for row in rows:
        for step in ("recorded", "passed"):
            if "error" in row.get(step, {}):
                told.append(f"- {row['network']}, {step}: {_short(row[step]['error'])}")
                break
        for path, why in row["recorded"].get("islands", {}).items():
            told.append(f"- {row['network']}, `{path}` is kept as it is: {_short(why)}")
    return told


def _short(text: str) -> str:
    """The first sentence, without the folders of this computer."""
    words = [w.rpartition("/")[2] if w.startswith("/") else w for w in text.split()]
    return " ".join(words)[:200]


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/capture.jsonl"))
    parser.add_argument("--only", nargs="*", default=[], metavar="NETWORK")
    parser.add_argument("--table", action="store_true", help="print the table of the results")
    args = parser.parse_args()
    if args.table:
        print(table(args.out), end="")
    else:
        run_all(args.out, args.only)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    main()
