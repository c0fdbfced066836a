"""onnxruntime: the only file that imports it.

Sessions, runs over many images, the graph after the runtime's own optimizations, and the runtime's
own quantizer (for comparison rows). Executed as a script, the file is the memory probe of
`bench`: a process that loads one model, runs it once and says how much memory that took.
No torch here, and `onnx` only where it is needed, since the probe counts what is imported.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from mpq.errors import DataError, ExportError, UsageError
from mpq.export import trial

Array = NDArray[Any]
_QUIET = 3  # errors only: the runtime warns about every hardware specific optimization


@dataclass(frozen=True, slots=True)
class ModelInput:
    """What a model file takes: one tensor of images.

    Args:
        name: of the input tensor.
        integer: uint8 pixels; otherwise float32.
        channels_last: NHWC instead of NCHW.
        batch: number of images the file is fixed to, None for any.
        channels: channels of an image.
        height: of an image in pixels, None for any.
        width: likewise.
    """

    name: str
    integer: bool
    channels_last: bool
    batch: int | None
    channels: int
    height: int | None
    width: int | None

    def shape(self, batch: int, *, side: int = 224) -> tuple[int, ...]:
        """The shape of a whole input; `side` stands in for a free height or width."""
        h, w, c = self.height or side, self.width or side, self.channels
        return (batch, h, w, c) if self.channels_last else (batch, c, h, w)


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
) -> ort.InferenceSession:
    """Load a model on the CPU.

    Args:
        model: a file or the bytes of one.
        threads: threads inside an operation.
        optimize: the runtime's default optimizations, or none at all.
        dump_to: where to write the graph after optimization.
        profile_to: how the files of the runtime's profiler begin, if it shall run.

    Raises:
        UsageError: there is no such file.
        ExportError: the runtime refuses the model.
    """
    name = "the model" if isinstance(model, bytes) else str(model)
    if not isinstance(model, bytes):
        if not Path(model).exists() or Path(model).is_dir():
            raise UsageError(f"model file {name} does not exist; `mpq export --onnx` writes one.")
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
        return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's exceptions share no base of their own
        raise ExportError(
            f"{name} must be an ONNX model that onnxruntime {version()} can load. {_brief(error)}"
        ) from None


def model_input(loaded: ort.InferenceSession) -> ModelInput:
    """What a session takes.

    Raises:
        DataError: the model does not take one batch of images.
    """
    inputs = loaded.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        listed = ", ".join(f"{i.name}: {i.type}{i.shape}" for i in inputs)
        raise DataError(f"the model must take one tensor of 4 dimensions (images). Got {listed}.")
    kind, shape = inputs[0].type, [d if isinstance(d, int) else None for d in inputs[0].shape]
    if kind not in ("tensor(float)", "tensor(uint8)"):
        raise DataError(f"input {inputs[0].name} must be float32 or uint8. Got {kind} instead.")
    last = shape[3] in (1, 3) and shape[1] not in (1, 3)
    channels, height, width = (shape[3], *shape[1:3]) if last else shape[1:]
    name = str(inputs[0].name)
    return ModelInput(name, kind == "tensor(uint8)", last, shape[0], channels or 3, height, width)


def metadata(loaded: ort.InferenceSession) -> dict[str, str]:
    """The `metadata_props` of the model file."""
    return dict(loaded.get_modelmeta().custom_metadata_map)


def run(loaded: ort.InferenceSession, images: Array, *, batch: int = 250) -> NDArray[np.float32]:
    """Logits of many images, `[n, classes]`.

    Args:
        loaded: a session.
        images: normalized float32 `[n, C, H, W]`, or pixels uint8 in either layout for a model that
            takes uint8; brought into the layout that the model takes.
        batch: images at a time; a model of fixed batch is fed its own number, the last one padded.

    Raises:
        DataError: images of another type, channel count or size than the model takes.
    """
    takes = model_input(loaded)
    images = arrange(images, takes)
    step = takes.batch or batch
    logits = [_run_batch(loaded, takes, part) for part in _parts(images, step)]
    if not logits:
        raise DataError("at least one image is needed. Got 0 instead.")
    return np.concatenate(logits)


def arrange(images: Array, takes: ModelInput) -> Array:
    """`images` in the layout that the model takes, checked (see `run`)."""
    want = np.uint8 if takes.integer else np.float32
    if images.ndim != 4 or images.dtype != want:
        raise DataError(
            f"images for input {takes.name} must be {np.dtype(want)} of 4 dimensions. "
            f"Got {images.dtype} of shape {images.shape} instead."
        )
    last = images.shape[3] in (1, 3) and images.shape[1] not in (1, 3)
    if last != takes.channels_last:
        images = images.transpose((0, 3, 1, 2) if last else (0, 2, 3, 1))
    expected = takes.shape(len(images))[1:]
    free = {None: slice(None)}  # a free size fits every image
    sizes = {1: takes.channels, 2: takes.height, 3: takes.width}
    if takes.channels_last:
        sizes = {1: takes.height, 2: takes.width, 3: takes.channels}
    if any(size not in free and images.shape[axis] != size for axis, size in sizes.items()):
        raise DataError(
            f"images for input {takes.name} must be {_by(expected)} each. "
            f"Got {_by(images.shape[1:])} instead."
        )
    return images


def _parts(images: Array, step: int) -> Iterator[Array]:
    for start in range(0, len(images), step):
        yield np.ascontiguousarray(images[start : start + step])


def _run_batch(loaded: ort.InferenceSession, takes: ModelInput, part: Array) -> Array:
    count = len(part)
    if takes.batch and count < takes.batch:
        part = np.concatenate([part, np.repeat(part[-1:], takes.batch - count, axis=0)])
    try:
        output = loaded.run(None, {takes.name: part})[0]
    except Exception as error:  # as in `session`
        raise ExportError(f"onnxruntime fails on input {takes.name}. {_brief(error)}") from None
    answers = np.asarray(output)
    if answers.ndim and len(answers) == len(part):
        return answers[:count].reshape(count, -1)
    return answers.reshape(len(part), -1)[:count]  # one image, answered without a batch


def values(
    model: bytes, images: Array, names: Sequence[str], *, optimize: bool = True
) -> dict[str, Array]:
    """Named graph outputs for one batch of images.

    Args:
        model: bytes of a model that has these outputs.
        images: one batch, in the layout and type that the model takes.
        names: outputs.
        optimize: as for `session`; an optimized graph is run as it stands.
    """
    loaded = session(model, optimize=optimize)
    results = loaded.run(list(names), {model_input(loaded).name: images})
    return dict(zip(names, results, strict=True))


def noise(loaded: ort.InferenceSession, batch: int) -> Array:
    """A batch of random images of a fixed seed, as the model takes them."""
    takes = model_input(loaded)
    rng, shape = np.random.default_rng(0), takes.shape(takes.batch or batch)
    if takes.integer:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.standard_normal(shape, np.float32)


def node_times(model: bytes, threads: int, batch: int, runs: int) -> dict[str, float]:
    """Seconds of each node by name, by the runtime's profiler; the least of `runs` runs.

    Args:
        model: bytes of a model that is run as it stands; its nodes need names of their own.
        threads: threads inside an operation.
        batch: images at a time, noise.
        runs: how many times it runs.
    """
    times: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        loaded = session(model, threads=threads, optimize=False, profile_to=Path(folder) / "p")
        feeds = {model_input(loaded).name: noise(loaded, batch)}
        for _ in range(runs):
            loaded.run(None, feeds)
        events = json.loads(Path(loaded.end_profiling()).read_text(encoding="utf-8"))
    for event in events:
        name, kernel, _ = str(event.get("name", "")).rpartition("_kernel_time")
        if kernel:
            times[name] = min(event["dur"] / 1e6, times.get(name, float("inf")))
    return times


def optimized_model(model: str | Path | bytes) -> Any:
    """The graph that really runs: an `onnx.ModelProto` after the default optimizations."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimized.onnx"
        session(model, dump_to=dump)
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

    with tempfile.TemporaryDirectory() as folder:
        ready = str(Path(folder) / "ready.onnx")
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
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def _probe(model: str, batch: int, threads: int) -> str:
    trial.bound(0)
    loaded = session(model, threads=threads)
    trial.loaded(model)
    takes = model_input(loaded)
    shape = takes.shape(takes.batch or batch)
    run(loaded, np.zeros(shape, np.uint8 if takes.integer else np.float32), batch=batch)
    return json.dumps({"peak_mb": round(peak_memory_mb(), 1)})


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(v) for v in shape)


if __name__ == "__main__":
    sys.stdout.write(_probe(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
