"""As onnxruntime_job.py, with OpenVINO: which layers run as integers, its own graph tells."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import openvino

MATRIX = ("Convolution", "GroupConvolution", "Deconvolution", "FullyConnected", "MatMul")
# Where the CPU has bfloat16, OpenVINO computes floats in it unless it is told not to.
ONE = {
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": 1,
    "NUM_STREAMS": 1,
    "PERFORMANCE_HINT": "LATENCY",
}


def main(folder: Path) -> None:
    """Load, answer all images in batches, time one image, write what came out."""
    job = json.loads((folder / "job.json").read_text())
    compiled = openvino.Core().compile_model(job["model"], "CPU", ONE)
    data = (folder / "feeds.bin").read_bytes()
    feeds = {
        t["name"]: np.frombuffer(data, t["type"], t["count"], t["offset"]).reshape(t["shape"])
        for t in job["feeds"]
    }
    step = job["batch"] or job["rows"]
    parts = []
    for start in range(0, job["rows"], step):
        found = compiled({k: x[start : start + step] for k, x in feeds.items()})
        parts.append([np.array(found[o]) for o in compiled.outputs])
    outputs = [np.concatenate(p) for p in zip(*parts, strict=True)]
    one = {k: x[: job["one"]] for k, x in feeds.items()}
    seconds = []
    for _ in range(job["runs"]):
        begun = time.perf_counter()
        compiled(one)
        seconds.append(time.perf_counter() - begun)
    (folder / "outputs.bin").write_bytes(b"".join(x.tobytes() for x in outputs))
    told = [
        {"name": f"output{i}", "type": str(x.dtype), "shape": list(x.shape)}
        for i, x in enumerate(outputs)
    ]
    nodes = [op.get_rt_info() for op in compiled.get_runtime_model().get_ordered_ops()]
    matrix = [
        str(i["runtimePrecision"].astype(str))
        for i in nodes
        if i["layerType"].astype(str) in MATRIX
    ]
    result = {
        "version": openvino.__version__,
        "outputs": told,
        "seconds": seconds,
        "layers": len(matrix),
        "integer": sum(p.lower() in ("i8", "u8") for p in matrix),
    }
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
