"""Times of layers elsewhere, on a device or in WebAssembly: a folder of files that is run there.

It holds the four files of `profile` whole, the first two of them in pieces (`pieces.py`),
`probe.json` that lists them, and a program that times all of them in turns and leaves
`result.json`: milliseconds only. For a device that is `probe.py`, which needs onnxruntime and
numpy alone; WebAssembly is timed in node here.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import onnx

from mpq.errors import ExportError, UsageError
from mpq.files import scratch, write_json
from mpq.graph.ir import QuantGraph
from mpq.latency import LatencyProfile
from mpq.limits import read_json
from mpq.target import Target
from mpq.targets import get_target, this_target

from . import foreign, runtime
from .foreign import RUNNERS, Foreign
from .pieces import COPIES, pieces, portable_graph
from .profile import RUNS, Times, charged_to, four_files, profile_of

PROBE, RESULT = "probe.json", "result.json"
PLACES = {"aarch64": "onnxruntime-arm64", "arm64": "onnxruntime-arm64", "wasm": "onnxruntime-wasm"}
"""The target that a machine is, by the name it gives itself."""


def write_probe(
    graph: QuantGraph, folder: Path, *, threads: int = 1, batch: int = 1, runs: int = RUNS
) -> None:
    """Write the folder; its `probe.json` comes last.

    Args:
        graph: in stage `float`; values of weights do not matter.
        folder: made if it does not exist.
        threads: threads inside an operation.
        batch: images at a time.
        runs: rounds that count.

    Raises:
        ExportError: the network cannot be exported.
    """
    wholes = four_files(graph)
    files = {f"whole-{i}.onnx": _fixed(data, batch) for i, data in enumerate(wholes)}
    feeds = runtime.noise(runtime.session(wholes[0]), batch)
    for kind, data in zip(("integer", "float"), wholes, strict=False):
        optimized, executed = portable_graph(data)
        parts = pieces(optimized, charged_to(optimized.graph, executed), feeds)
        for index, name in enumerate(graph.layers):
            if name in parts:
                files[f"{kind}-{index}.onnx"] = parts[name]
    settings = {"threads": threads, "batch": batch, "runs": runs}
    _write(folder, files, {"key": _key(graph, threads, batch), **settings})


def _write(folder: Path, files: Mapping[str, bytes], settings: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    shutil.copy(RUNNERS / "probe.py", folder / "probe.py")
    write_json(folder / PROBE, {**settings, "files": list(files)})


def _fixed(data: bytes, batch: int) -> bytes:
    """A model whose inputs have that many samples."""
    feeds, model = runtime.noise(runtime.session(data), batch), onnx.load_from_string(data)
    for one in model.graph.input:
        for dim, size in zip(one.type.tensor_type.shape.dim, feeds[one.name].shape, strict=True):
            dim.dim_value = size
    fixed: bytes = model.SerializeToString()
    return fixed


def read_result(graph: QuantGraph, result: Path, *, target: str | None = None) -> LatencyProfile:
    """The profile of a network from what a probe of it measured.

    Args:
        graph: in stage `float`, of the network that the probe was made for.
        result: `result.json`, or the folder that holds it.
        target: what was measured; None: as its machine says.

    Raises:
        UsageError: there is none, or it is of something else.
    """
    path = result / RESULT if result.is_dir() else result
    if not path.is_file():
        raise UsageError(f"{path} does not exist. Run probe.py of the folder on the device first.")
    told = read_json(path, UsageError, "probe.py, which `mpq profile --export-probe` writes,")
    try:
        threads, batch = int(told["threads"]), int(told["batch"])
        ms = dict(zip(map(str, told["files"]), map(float, told["ms"]), strict=True))
        if told["key"] != _key(graph, threads, batch):
            raise UsageError(
                f"{path} was measured with a probe of another network, or of another version of "
                "mpq. Write one of this network with --export-probe."
            )
        times = Times(str(told["cpu"]), str(told["runtime"]), threads, batch)
        place = target or PLACES.get(str(told["machine"]), "")
        totals = [ms[f"whole-{i}.onnx"] for i in range(4)]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} must be what probe.py wrote. Cannot read it: {type(error).__name__}: {error}"
        ) from None
    parts = [
        {name: ms.get(f"{kind}-{i}.onnx", 0.0) / COPIES for i, name in enumerate(graph.layers)}
        for kind in ("integer", "float")
    ]
    return profile_of(graph, times, totals, parts, place)


def runtime_of(target: Target) -> Foreign:
    """The runtime of this computer that measures another target.

    Raises:
        UsageError: none does: not installed, or its CPU is another one.
    """
    if target.arithmetic != "wasm" or target.members:
        raise UsageError(
            f"times of {target.name} must come from such a computer, and this one is "
            f"{this_target().name}. Write a folder to be run there with --export-probe FOLDER, "
            "and read what it gives with --import."
        )
    return foreign.of_target(target)


def profile_there(
    graph: QuantGraph, target: Target, *, threads: int = 1, batch: int = 1, runs: int = RUNS
) -> LatencyProfile:
    """The profile of a network in another runtime of this computer.

    Raises:
        UsageError: as `runtime_of`.
        ExportError: the network cannot be exported, or the runtime fails.
    """
    there = runtime_of(target)
    with scratch() as folder:
        write_probe(graph, folder, threads=threads, batch=batch, runs=runs)
        foreign.start(there, folder, "probe")
        return read_result(graph, folder, target=target.name)


def measure_there(file: Path, found: LatencyProfile) -> float:
    """Milliseconds of a file where a profile was measured. Raises as `profile_there`."""
    there = runtime_of(get_target(found.target))
    settings = {"key": "", "threads": found.threads, "batch": found.batch, "runs": RUNS}
    with scratch() as folder:
        _write(folder, {"whole.onnx": _fixed(file.read_bytes(), found.batch)}, settings)
        foreign.start(there, folder, "probe")
        told = read_json(folder / RESULT, ExportError, there.name)
        return float(told["ms"][0])


def _key(graph: QuantGraph, threads: int, batch: int) -> str:
    layers: list[Any] = [asdict(layer) for layer in graph.layers.values()]
    identity = json.dumps([COPIES, threads, batch, layers, str(graph.module.graph)])
    return hashlib.sha256(identity.encode()).hexdigest()[:24]
