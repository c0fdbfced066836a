"""Time the files beside this program on the computer that it runs on, with onnxruntime and numpy.

`python3 probe.py` reads probe.json and writes result.json, for `mpq profile MODEL --import`. Leave
the computer alone meanwhile.
"""

import json
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

FOLDER = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent


def name_of_cpu() -> str:
    """The model of the board or of the CPU, as the system names it."""
    board = Path("/proc/device-tree/model")
    named = board.read_text().strip("\0\n ") if board.exists() else platform.processor()
    return named or platform.machine()


def open_file(file: str, threads: int) -> tuple[Any, dict[str, Any]]:
    """A session and noise for it. Pieces are run as they stand, whole networks are optimized."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    if not file.startswith("whole"):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(FOLDER / file), options, ["CPUExecutionProvider"])
    rng, feeds = np.random.default_rng(0), {}
    for one in session.get_inputs():
        if one.type == "tensor(float)":
            feeds[one.name] = rng.standard_normal(one.shape, np.float32)
        else:
            kind = np.uint8 if one.type == "tensor(uint8)" else np.int8
            feeds[one.name] = rng.integers(0, 100, one.shape, kind)
    return session, feeds


probe = json.loads((FOLDER / "probe.json").read_text())
opened = [open_file(file, probe["threads"]) for file in probe["files"]]
clock = time.thread_time if probe["threads"] == 1 and sys.platform != "win32" else time.perf_counter
times: list[list[float]] = [[] for _ in opened]
for _ in range(probe["runs"] + 3):
    for spent, (session, feeds) in zip(times, opened):  # noqa: B905 - Python 3.9 too
        begun = clock()
        session.run(None, feeds)
        spent.append(1e3 * (clock() - begun))
result = {**probe, "cpu": name_of_cpu(), "machine": platform.machine()}
ms = [statistics.median(spent[3:]) for spent in times]
result.update(runtime=f"onnxruntime {ort.__version__}", ms=ms)
(FOLDER / "result.json").write_text(json.dumps(result))
print(f"wrote {FOLDER / 'result.json'}")
