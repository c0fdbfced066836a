"""Run one model file with the onnxruntime of this Python, which needs that and numpy alone.

`python onnxruntime_job.py FOLDER`: FOLDER holds job.json and feeds.bin, and gets result.json and
outputs.bin (`mpq.export.foreign` says what stands in them).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort


def read(folder: Path, tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """The tensors of a job by name."""
    data = (folder / "feeds.bin").read_bytes()
    return {
        t["name"]: np.frombuffer(data, t["type"], t["count"], t["offset"]).reshape(t["shape"])
        for t in tensors
    }


def main(folder: Path) -> None:
    """Load, answer all images in batches, time one image, write what came out."""
    job = json.loads((folder / "job.json").read_text())
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if job["optimize"]:
        options.optimized_model_filepath = str(folder / "optimized.onnx")
    else:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    feeds, step = read(folder, job["feeds"]), job["batch"]
    names = [o.name for o in session.get_outputs()]
    parts = []
    for start in range(0, job["rows"], step) if step else [0]:
        part = {k: x[start : start + step] if step else x for k, x in feeds.items()}
        parts.append(session.run(names, part))
    outputs = [np.concatenate(p) if step else p[0] for p in zip(*parts, strict=True)]
    seconds = []
    for _ in range(job["runs"]):
        one = {k: x[: job["one"]] for k, x in feeds.items()}
        begun = time.perf_counter()
        session.run(names, one)
        seconds.append(time.perf_counter() - begun)
    (folder / "outputs.bin").write_bytes(b"".join(x.tobytes() for x in outputs))
    told = [
        {"name": n, "type": str(x.dtype), "shape": list(x.shape)}
        for n, x in zip(names, outputs, strict=True)
    ]
    result = {"version": ort.__version__, "outputs": told, "seconds": seconds}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
