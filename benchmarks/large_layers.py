"""Large packed layers in several versions of onnxruntime: is the unpacking folded at load?

`python benchmarks/large_layers.py PYTHON ...` makes a 4096x4096 linear layer and a 3x3 convolution
of 2048 channels, 4 bits as `cast` and `unpack` and 3 bits as packed bytes, and loads each with the
onnxruntime of every interpreter that is named (see `mpq portability --install VERSION`).
A row of `rows/large_layers.jsonl` has CPU seconds to load, the most memory meanwhile and what is
held after, milliseconds of a run with one thread, and the nodes that run.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from mpq.export.edit import LAYER
from mpq.export.form import Form
from mpq.export.pack import pack

ROOT = Path(__file__).resolve().parent
OUT = ROOT.parent / "build" / "large_layers"
ROWS = ROOT / "results" / "rows" / "large_layers.jsonl"
NETS = {
    "linear 4096x4096": ("Gemm", (4096, 4096), (1, 4096), {"transB": 1}),
    "conv 2048 3x3": ("Conv", (2048, 2048, 3, 3), (1, 2048, 4, 4), {"pads": [1, 1, 1, 1]}),
}
FORMS = {
    "W8": (8, Form()),
    "W4 cast": (4, Form()),
    "W4 unpack": (4, Form("unpack", opset=18, ir=8)),
    "W3 unpack": (3, Form("unpack", opset=18, ir=8)),
}
PROBE = r"""
import collections, json, statistics, sys, tempfile, time
import numpy as np, onnxruntime as ort
def held(key):
    lines = open("/proc/self/status").read().splitlines()
    return round(int(next(l for l in lines if l.startswith(key)).split()[1]) / 1e3)
before, file = held("VmRSS"), sys.argv[1]
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 1, 3
begun = time.process_time()
session = ort.InferenceSession(file, options, ["CPUExecutionProvider"])
load, peak, after = time.process_time() - begun, held("VmHWM"), held("VmRSS")
one = session.get_inputs()[0]
shape = [n if isinstance(n, int) else 1 for n in one.shape]
feed = {one.name: np.random.default_rng(0).standard_normal(shape, np.float32)}
times = []
for _ in range(6):
    begun = time.thread_time()
    session.run(None, feed)
    times.append(1e3 * (time.thread_time() - begun))
options.enable_profiling, options.profile_file_prefix = True, tempfile.mkdtemp() + "/p"
del session
session = ort.InferenceSession(file, options, ["CPUExecutionProvider"])
session.run(None, feed)
events = json.load(open(session.end_profiling()))
events = [e for e in events if e["name"].endswith("_kernel_time")]
ops = collections.Counter(e["args"]["op_name"] for e in events)
print(json.dumps({"runtime": ort.__version__, "load_s": round(load, 2), "peak_mb": peak - before,
                  "held_mb": after - before, "ms": round(statistics.median(times[1:]), 2),
                  "nodes": dict(ops)}))
"""


def layer(net: str, bits: int, form: Form) -> onnx.ModelProto:
    """One layer between quantizers, its weights stored in a form of mpq."""
    op, shape, size, attributes = NETS[net]
    rng, top = np.random.default_rng(0), 1 << (bits - 1)
    constants = {
        "w": rng.integers(-top, top, shape, np.int8),
        "ws": np.full(shape[0], 0.02 / top, np.float32),
        "wz": np.zeros(shape[0], np.int8),
        "s": np.float32(0.05),
        "z": np.uint8(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["f"], axis=0),
        helper.make_node(op, ["d", "f"], ["y"], name="layer", **attributes),
        helper.make_node("QuantizeLinear", ["y", "s", "z"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "s", "z"], ["out"]),
    ]
    nodes[3].metadata_props.add(key=LAYER, value="layer")
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, size),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, None),
    ]
    stored = [numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], stored)
    opset = [helper.make_opsetid("", form.opset)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=form.ir))
    pack(model, {"layer": bits}, form)
    return ir.to_proto(model)


def files() -> Iterator[tuple[str, str, Path]]:
    """Each layer in each form."""
    OUT.mkdir(parents=True, exist_ok=True)
    for net in NETS:
        for name, (bits, form) in FORMS.items():
            path = OUT / f"{net}-{name}.onnx".replace(" ", "-")
            path.write_bytes(layer(net, bits, form).SerializeToString())
            yield net, name, path


def main() -> None:
    """Make the files, load them with each interpreter, keep and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", nargs="*", default=[sys.executable])
    asked, rows = parser.parse_args(), []
    for net, form, path in list(files()):
        for python in asked.python:
            done = subprocess.run(
                [python, "-c", PROBE, str(path)], capture_output=True, text=True, check=False
            )
            row = {"net": net, "form": form, "bytes": path.stat().st_size}
            error = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
            row |= {"problem": error[0]} if done.returncode else json.loads(done.stdout)
            rows.append(row)
            print(json.dumps(row), flush=True)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
