"""onnxruntime: the only file that imports it.

Sessions, runs over many samples, the graph after the runtime's own optimizations, and the runtime's
own quantizer (for comparison rows). Executed as a script, the file is the memory probe of
`bench`: a process that loads one model, runs it once and says how much memory that took.
No torch here, and `onnx` only where it is needed, since the probe counts what is imported.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mpq.errors import DataError, ExportError, UsageError
from mpq.export import trial
from mpq.export.feeds import (
    Array,
    Feed,
    ModelInput,
    arrange,
    feeds,
    fixed_batch,
    model_input,
    named,
    noise,
    parts,
)
from mpq.files import scratch

__all__ = [
    "ModelInput",
    "Session",
    "answers",
    "arrange",
    "fixed_batch",
    "metadata",
    "model_input",
    "node_times",
    "noise",
    "optimized_model",
    "peak_memory_mb",
    "quantize_dynamic",
    "quantize_static",
    "run",
    "session",
    "values",
    "version",
]
Session: TypeAlias = ort.InferenceSession
_QUIET = 3  # errors only: the runtime warns about every hardware specific optimization


def version() -> str:
    """Version of the runtime, e.g. `1.31.1`."""
    return str(ort.__version__)


def session(
    model: str | Path | bytes,
    *,
    threads: int = 1,
    optimize: bool = True,
    dump_to: Path | None = None,
    profile_to: Path | None = None,
    without: Sequence[str] = (),
) -> Session:
    """Load a model on the CPU.

    Args:
        model: a file or the bytes of one.
        threads: threads inside an operation.
        optimize: the runtime's default optimizations, or none at all.
        dump_to: where to write the graph after optimization.
        profile_to: how the files of the runtime's profiler begin, if it shall run.
        without: optimizations to leave out, by the runtime's names.

    Raises:
        UsageError: there is no such file.
        ExportError: the runtime refuses the model.
    """
    name = "the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes):
        if not Path(model).exists() or Path(model).is_dir():
            raise UsageError(f"model file {name} does not exist; `mpq export` writes one.")
        trial.hold(Path(model))
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _QUIET
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if dump_to is not None:
        options.optimized_model_filepath = str(dump_to)
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(
            source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(without) or None,
        )
    except Exception as error:  # the runtime's exceptions share no base of their own
        raise ExportError(
            f"{name} must be an ONNX model that onnxruntime {version()} can load. {_brief(error)}"
        ) from None


def metadata(loaded: Session) -> dict[str, str]:
    """The `metadata_props` of the model file."""
    return dict(loaded.get_modelmeta().custom_metadata_map)


def run(loaded: Session, images: Array, *, batch: int = 250) -> NDArray[np.float32]:
    """Logits of many images, `[n, classes]`: the first output of `answers`, flat.

    Raises:
        DataError: images of another type, channel count or size than the model takes.
    """
    first: Array = next(iter(answers(loaded, images, batch=batch).values()))
    return first.reshape(len(images), -1)


def answers(loaded: Session, inputs: Feed, *, batch: int = 250) -> dict[str, Array]:
    """Every output by name for many samples, its batches joined along the first dimension.

    Args:
        loaded: a session.
        inputs: arrays `[n, ...]` by name of input, or in the order of the inputs. A lone array is
            given to the only input: float32 `[n, C, H, W]`, normalized, or uint8 pixels in either
            layout, brought into the one that the model takes.
        batch: samples at a time; a model of fixed batch is fed its own number, the last one padded.

    Raises:
        DataError: arrays of another type, number, name or size than the model takes.
        ExportError: the runtime fails.
    """
    given = feeds(loaded, inputs)
    total = max((len(x) for x in given.values() if x.ndim), default=0)
    if not total:
        raise DataError("at least one image is needed. Got 0 instead.")
    names, fixed = [str(o.name) for o in loaded.get_outputs()], fixed_batch(loaded)
    found = [_run_batch(loaded, part, fixed) for part in parts(given, total, fixed or batch)]
    joined = (
        np.concatenate([np.atleast_1d(x) for x in batches]) for batches in zip(*found, strict=True)
    )
    return dict(zip(names, joined, strict=True))


def _run_batch(loaded: Any, part: dict[str, Array], fixed: int | None) -> list[Array]:
    """The outputs for one batch, filled up to a fixed number and cut again."""
    count = max(len(x) for x in part.values() if x.ndim)
    missing = fixed - count if fixed else 0
    if missing > 0:
        filler = {n: x[-1:].repeat(missing, 0) for n, x in part.items() if x.ndim}
        part |= {name: np.concatenate([part[name], x]) for name, x in filler.items()}
    try:
        found = [np.asarray(output) for output in loaded.run(None, part)]
    except Exception as error:  # as in `session`
        raise ExportError(
            f"onnxruntime fails on input {', '.join(part)}. {_brief(error)}"
        ) from None
    return [x[:count] if missing > 0 and x.ndim and len(x) == fixed else x for x in found]


def values(
    model: bytes, inputs: Feed, names: Sequence[str], *, optimize: bool = True
) -> dict[str, Array]:
    """Named graph outputs for one batch.

    Args:
        model: bytes of a model that has these outputs.
        inputs: one batch, in the layout and type that the model takes (see `answers`).
        names: outputs.
        optimize: as for `session`; an optimized graph is run as it stands.
    """
    loaded = session(model, optimize=optimize)
    given = named(inputs, [str(one.name) for one in loaded.get_inputs()])
    results = loaded.run(list(names), dict(given))
    return dict(zip(names, results, strict=True))


def node_times(model: bytes, threads: int, batch: int, runs: int) -> dict[str, float]:
    """Seconds of each node by name, by the runtime's profiler; the least of `runs` runs.

    Args:
        model: bytes of a model that is run as it stands; its nodes need names of their own.
        threads: threads inside an operation.
        batch: images at a time, noise.
        runs: how many times it runs.
    """
    times: dict[str, float] = {}
    with scratch() as folder:
        loaded = session(model, threads=threads, optimize=False, profile_to=folder / "p")
        noisy = noise(loaded, batch)
        for _ in range(runs):
            loaded.run(None, noisy)
        events = json.loads(Path(loaded.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        name, kernel, _ = str(event.get("name", "")).rpartition("_kernel_time")
        if kernel:
            times[name] = min(event["dur"] / 1e6, times.get(name, float("inf")))
    return times


def optimized_model(model: str | Path | bytes, *, without: Sequence[str] = ()) -> Any:
    """The graph that really runs: an `onnx.ModelProto` after the default optimizations."""
    import onnx

    with scratch() as folder:
        dump = folder / "optimized.onnx"
        session(model, dump_to=dump, without=without)
        # Large weights may still lie in the data file of the original, which is not beside it.
        return onnx.load(dump, load_external_data=False)


def quantize_static(source: Path, out: Path, feeds: Iterable[Mapping[str, Array]]) -> None:
    """The runtime's own static quantization: U8S8, QDQ, per channel, MinMax over `feeds`.

    Weights take 7 bits on CPUs without VNNI, as its documentation advises.
    """
    from onnxruntime import quantization as tool

    from mpq.targets import this_target

    class Reader(tool.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self._left, None)

    with _prepared(source) as ready:
        tool.quantize_static(
            ready,
            str(out),
            Reader(),
            quant_format=tool.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=this_target().saturates,
            activation_type=tool.QuantType.QUInt8,
            weight_type=tool.QuantType.QInt8,
            calibrate_method=tool.CalibrationMethod.MinMax,
        )


def quantize_dynamic(source: Path, out: Path) -> None:
    """The runtime's own dynamic quantization (no calibration data; activations at run time)."""
    from onnxruntime import quantization as tool

    with _prepared(source) as ready:
        # ConvInteger has a CPU kernel for unsigned weights only.
        tool.quantize_dynamic(ready, str(out), weight_type=tool.QuantType.QUInt8)


@contextmanager
def _prepared(source: Path) -> Iterator[str]:
    """The tool's own preparation (it fuses batch norms), without which its results are poor."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with scratch() as folder:
        ready = str(folder / "ready.onnx")
        quant_pre_process(str(source), ready, skip_symbolic_shape=True)
        # torch's exporter notes the shapes of weights; the tool transposes the weight of a Gemm,
        # keeps the note, and fails on the contradiction. It infers what it needs anyway.
        model = onnx.load(ready)
        del model.graph.value_info[:]
        onnx.save(model, ready)
        yield ready


def peak_memory_mb() -> float:
    """The most memory this process has held so far, in MB (10^6 bytes), resident.

    Linux counts into `ru_maxrss` what the parent held when it started this process, so the high
    water mark of the process itself is preferred where the system tells it.
    """
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.is_file() else None
    if found:
        return int(found.group(1)) * 1024 / 1e6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _probe(model: str, batch: int, threads: int) -> str:
    trial.bound(0)
    loaded = session(model, threads=threads)
    trial.loaded(model)
    answers(loaded, noise(loaded, batch), batch=batch)
    return json.dumps({"peak_mb": round(peak_memory_mb(), 1)})


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


if __name__ == "__main__":
    sys.stdout.write(_probe(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
