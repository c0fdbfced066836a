"""What a busy computer costs: wall time of commands beside a process that computes, over idle.

    python benchmarks/busy.py [--rounds 3] [--only analyze demo]

Idle, busy, bound to one processor, and busy with threads that spin as OpenMP's default has it; in
turns, so that a drift of the machine falls on all alike. Needs `MPQ_DATA` for `analyze`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

COMMANDS = {
    "analyze": ["analyze", "resnet20-cifar10.pth", "--data", "cifar10", "--normalize", "imagenet"],
    "demo": ["demo"],
}
BUSY = "import numpy as np\na = np.ones(4000)\nwhile True: a *= 1.0"
SPINNING = {"OMP_WAIT_POLICY": "ACTIVE"}


def seconds(command: list[str], *, busy: bool, cpus: int | None, env: dict[str, str]) -> float:
    """Wall time of one command in a new folder.

    Args:
        command: words after `mpq`.
        busy: whether a process that never waits runs beside it.
        cpus: processors it is bound to; None: all.
        env: on top of this process's.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if busy:
            other = subprocess.Popen([sys.executable, "-c", BUSY])
            stack.callback(other.wait)
            stack.callback(other.kill)
            time.sleep(1)
        bound = [] if cpus is None else ["taskset", "-c", f"0-{cpus - 1}"]
        began = time.perf_counter()
        subprocess.run(
            [*bound, sys.executable, "-m", "mpq", *command],
            cwd=folder, env=os.environ | env,
            check=True, capture_output=True,
        )  # fmt: skip
        return time.perf_counter() - began


def main() -> None:
    """Measure in turns and print medians, and each as a multiple of idle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    options = parser.parse_args()
    for name in ("OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        os.environ.pop(name, None)
    data = Path(os.environ.get("MPQ_DATA", "../shared/data")).resolve()
    os.environ["MPQ_DATA"] = str(data)
    ways = {
        "idle": {"busy": False, "cpus": None, "env": {}},
        "busy": {"busy": True, "cpus": None, "env": {}},
        "one processor": {"busy": False, "cpus": 1, "env": {}},
        "busy, spinning": {"busy": True, "cpus": None, "env": SPINNING},
    }
    for name in options.only:
        command = [str(next(data.rglob(w))) if w.endswith(".pth") else w for w in COMMANDS[name]]
        found: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.rounds):
            for way, how in ways.items():
                found[way].append(seconds(command, **how))
        idle = statistics.median(found["idle"])
        for way, values in found.items():
            middle = statistics.median(values)
            told = f"{middle:6.1f} s ({min(values):.1f} to {max(values):.1f})"
            print(f"{name:8} {way:15} {told}  {middle / idle:.2f} of idle", flush=True)


if __name__ == "__main__":
    main()
