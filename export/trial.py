"""Model files of anybody's are held within limits of memory and time before they are run here.

The runtime computes what is constant while it loads a file: a few bytes can ask for any memory
(`ConstantOfShape`, `Expand`, a chain of `Concat`, sparse weights) or never end (`Loop`), and it
cannot be stopped while it does. Where the shape of every tensor can be told from the file and all
are small, nothing more is needed. Any other file is loaded and run once in a process of its own
that may take no more than the limits; what fails there for another reason is told by whoever loads
it next.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mpq.errors import ExportError
from mpq.limits import check_file, current, exceeded

TRIAL = "MPQ_TRIAL"
"""In the environment of the process that tries: MB to load with, and to run one image with."""
FOLDED = 4
"""What is constant may take this part of what a run may take."""
PER_FILE = 4
"""A file's own size may be held so often: its bytes, its tensors, and in the kernels' layout."""
UNPACKED = 64
"""And so often while it is loaded: weights of 2 bits pass through 13 bytes each (`unpack.py`)."""
OPAQUE = {"Einsum", "STFT", "DFT", "LSTM", "GRU", "RNN", "DeformConv", "GridSample"}
"""Operators that take more memory inside than their tensors tell."""
SIDE, SMALL = 224, 1024
"""Of images of any size, in pixels; of weights whose values decide no shape, in bytes."""
_INT64, _WIDE, _BYTE, _FOLLOWED = 7, (7, 11, 13, 14, 15), (2, 3, 9), 400
"""Of `TensorProto.DataType`: int64, types of 8 bytes and more, of one; bytes of a size followed."""
_tried: set[tuple[str, int, int]] = set()


def hold(path: Path) -> None:
    """Refuse what is no regular file, or does not load and run once within the limits.

    Raises:
        ExportError: one of these.
    """
    check_file(path, "file_mb", ExportError)
    found = path.stat()
    key = (str(path.resolve()), found.st_size, found.st_mtime_ns)
    if TRIAL in os.environ or key in _tried:
        return
    for outside in _outside(path):
        check_file(outside, "file_mb", ExportError)
    most = current().onnx_mb + PER_FILE * found.st_size / 1e6
    least = current().onnx_mb / FOLDED + UNPACKED * found.st_size / 1e6
    if not _is_plain(path, least * 1e6, most * 1e6):
        _try(path, least, most)
    _tried.add(key)


def bound(stage: int) -> None:
    """In the process that tries: allow it the memory of a stage (0: load, 1: run) from here on."""
    if TRIAL not in os.environ:
        return
    import resource  # not on Windows, where nothing bounds the memory of a process

    allowed = float(os.environ[TRIAL].split(",")[stage]) * 1e6
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    size = pages * resource.getpagesize() + int(allowed)
    resource.setrlimit(resource.RLIMIT_DATA, (size, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def loaded(path: str) -> None:
    """In the process that tries: follow the shapes as the certificate does, then allow the run."""
    if TRIAL in os.environ:
        import onnx

        onnx.shape_inference.infer_shapes(onnx.load(path), data_prop=True)
        bound(1)


def _try(path: Path, least: float, most: float) -> None:
    """Load and run the file once in a process of its own."""
    script = str(Path(__file__).with_name("runtime.py"))
    try:
        done = subprocess.run(
            [sys.executable, "-P", script, str(path), "1", "1"],
            env={**os.environ, TRIAL: f"{least},{most}"},
            capture_output=True,
            timeout=current().onnx_seconds,
        )
    except subprocess.TimeoutExpired:
        got = "it was not loaded and run once by then"
        raise ExportError(exceeded(str(path), "onnx_seconds", got)) from None
    told = done.stderr.decode(errors="replace")
    if any(mark in told for mark in ("llocate memory", "bad_alloc", "MemoryError")):
        got = f"loading takes more than {least:,.0f} MB, or one image more than {most:,.0f}"
        raise ExportError(exceeded(str(path), "onnx_mb", got))
    if done.returncode < 0:
        raise ExportError(
            f"{path} must be an ONNX model that onnxruntime can run. A process that tried it ended "
            f"with signal {-done.returncode}."
        )


def _outside(path: Path) -> list[Path]:
    """The files of weights that a model file points to."""
    model = _parsed(path)
    places = () if model is None else (t.external_data for t in model.graph.initializer)
    named = {entry.value for place in places for entry in place if entry.key == "location"}
    return [path.parent / name for name in named]


def _parsed(path: Path) -> Any:
    """The model without the weights that lie elsewhere; None where it is none."""
    import onnx

    try:
        return onnx.load(path, load_external_data=False)
    except Exception:  # protobuf's are of no known base
        return None


def _is_plain(path: Path, folded: float, most: float) -> bool:
    """Whether all tensors are known to be small: in bytes, of constants and of one image."""
    model = _parsed(path)
    if model is None or model.functions or model.graph.sparse_initializer:
        return False
    nodes = model.graph.node
    if any(n.op_type in OPAQUE or any(map(_nests, n.attribute)) for n in nodes):
        return False
    constant, shapes = {t.name for t in model.graph.initializer}, _shapes(model)
    fixed = free = inside = 0.0
    for node in nodes:
        size = sum(_bytes(shapes.get(name)) for name in node.output if name)
        if constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
            fixed += size
        else:
            free += size
        if "Conv" in node.op_type:
            inside = max(inside, _unfolded(node, shapes))
    return fixed <= folded and free + inside <= most


def _nests(attribute: Any) -> bool:
    """Whether an attribute is a graph, or a tensor that is not stored value by value."""
    return bool(attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"))


_Shape = tuple[int, list[int]]
"""Type of the elements, sizes."""


def _shapes(model: Any) -> dict[str, _Shape]:
    """What can be told of each tensor for one image, whatever the file itself says of it."""
    import onnx

    found: dict[str, _Shape] = {
        t.name: (t.data_type, list(t.dims)) for t in model.graph.initializer
    }
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > SMALL:
            tensor.ClearField("raw_data")
    for value in model.graph.input:
        for k, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value"):
                dim.dim_value = SIDE if k else 1
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # of whatever kind: then nothing is known
        return found
    for value in (*graph.input, *graph.value_info, *graph.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim):
            found[value.name] = (tensor.elem_type, [d.dim_value for d in tensor.shape.dim])
    return found


def _bytes(shape: _Shape | None) -> float:
    """Of a tensor; infinite where its shape is not known."""
    if shape is None or any(size < 0 for size in shape[1]):
        return math.inf
    kind, sizes = shape
    # Whoever follows the sizes that a file computes holds each of them as an object.
    if kind == _INT64 and len(sizes) < 2:
        return math.prod(sizes) * _FOLLOWED
    return math.prod(sizes) * (8 if kind in _WIDE else 1 if kind in _BYTE else 4)


def _unfolded(node: Any, shapes: dict[str, _Shape]) -> float:
    """Bytes of the image of a convolution with its windows side by side."""
    weights = [shapes[n][1] for n in node.input if len(shapes.get(n, (0, []))[1]) > 2][1:]
    place = node.input[0] if "Transpose" in node.op_type else node.output[0]
    if not weights or not weights[0][0]:
        return math.inf
    return _bytes(shapes.get(place)) * math.prod(weights[0][1:]) / weights[0][0]
