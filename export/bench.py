"""Accuracy, latency, size and memory of model files, side by side.

Latency is interleaved: every round runs each file once, in an order that rotates from round to
round, so that a busy machine slows all of them alike; the first rounds are dropped. The ratio is
the median over rounds of `t_float / t_file`, so that what a round suffers cancels. Memory is the
high water mark of a process of its own that loads the file and runs it once.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpq.data import Normalization
from mpq.data.dataset import Samples, length, rows
from mpq.errors import DataError, UsageError
from mpq.export import runtime
from mpq.export.agreement import Agreement, agreements, feed_of
from mpq.export.fileinfo import file_info
from mpq.noise import interval

logger = logging.getLogger(__name__)
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds for one batch: median, 10th and 90th percentile over the rounds."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True, slots=True)
class Timing:
    """How latency and memory are measured.

    Args:
        threads: threads inside an operation.
        batch: images at a time.
        runs: rounds that count; a tenth of them (at least 5) runs before as warm-up.

    Raises:
        UsageError: a number out of range.
    """

    threads: int = 1
    batch: int = 1
    runs: int = 200

    def __post_init__(self) -> None:
        if min(self.threads, self.batch, self.runs) < 1:
            raise UsageError(
                "threads, batch and runs must be at least 1. "
                f"Got {self.threads}, {self.batch} and {self.runs}."
            )


@dataclass(frozen=True, slots=True)
class BenchRow:
    """One line of `bench.jsonl`.

    Args:
        file: as it was named.
        bytes: on disk, external data included.
        top1: percent, None without labels.
        n: images that `top1` was measured on.
        latency_ms: of one batch.
        ratio_to_float: times faster than the float file; None without one.
        threads: threads inside an operation.
        batch: images at a time for latency and memory.
        peak_mb: resident memory (10^6 bytes) of a process that loads and runs the file, the
            interpreter and the runtime included; None where it could not be measured.
        metric: name of a metric that was asked for besides.
        value: of that metric.
        lost: against the float file by that metric: value, low and high of its 95 % interval.
        agreement: percent of choices that are those of the float file, where there is no top-1;
            None of the float file itself, and where nothing is chosen (`mpq.outputs`).
        sqnr_db: of quantities, against those of the float file, likewise.
        compared: samples that these two were measured on.
    """

    file: str
    bytes: int
    top1: float | None
    n: int
    latency_ms: Latency
    ratio_to_float: float | None
    threads: int
    batch: int
    peak_mb: float | None
    metric: str | None = None
    value: float | None = None
    lost: dict[str, float] | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    compared: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The row as JSON has it; what a metric or a comparison says only where there was one."""
        row = asdict(self)
        unasked = [k for k in ("metric", "value", "lost") if row[k] is None]
        uncompared = ("agreement", "sqnr_db", "compared") if not self.compared else ()
        return {k: v for k, v in row.items() if k not in (*unasked, *uncompared)}

    def to_json(self) -> str:
        """The row as one line of JSON, with the 95 % interval of its accuracy."""
        sure = None if self.top1 is None or not self.n else list(interval(self.top1, self.n))
        return json.dumps({**self.to_dict(), "top1_interval": sure})


def bench(
    files: Sequence[Path],
    *,
    images: Samples | None,
    labels: Array | None = None,
    float_file: Path | None = None,
    normalize: Normalization | None = None,
    outputs: Mapping[str, str] | None = None,
    timing: Timing | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[BenchRow]:
    """Measure model files against each other and against the float model.

    Args:
        files: ONNX files; the float file becomes the first row, named here or not.
        images: uint8 `[n, H, W, C]`, or arrays by name of input; None measures latency, size and
            memory only.
        labels: int64 `[n]`, of classifiers; None: agreement with the float file is measured.
        float_file: what `ratio_to_float` refers to.
        normalize: for every file that takes floats. None: what each file says of itself, else what
            another of the files says.
        outputs: kinds of the float file's outputs by name, where there are no labels.
        timing: how latency is measured; None: one thread, one image, 200 rounds.
        progress: called with what is being measured.

    Raises:
        UsageError: no file, or a missing one.
        DataError: images, labels or normalization that do not fit a file.
    """
    timing = timing or Timing()
    threads, batch = timing.threads, timing.batch
    paths = _unique([*([float_file] if float_file else []), *files])
    say = progress or (lambda _: None)
    scales = _normalizations(paths, normalize)
    top1s = [_measure_top1(p, images, labels, scales[p], say) for p in paths]
    near: dict[Path, Agreement] = {}
    if images is not None and labels is None and float_file:
        near = agreements(scales, paths[0], images, outputs or {}, say)
    say("latency")
    runners = [runner(p, threads=threads, batch=batch) for p in paths]
    times = 1e3 * interleave(runners, runs=timing.runs)
    return [
        BenchRow(
            file=str(path),
            bytes=file_bytes(path),
            top1=top1,
            n=0 if top1 is None or images is None else length(images),
            latency_ms=Latency(*(round(float(v), 4) for v in np.percentile(t, (50, 10, 90)))),
            ratio_to_float=round(float(np.median(times[0] / t)), 3) if float_file else None,
            threads=threads,
            batch=batch,
            peak_mb=peak_mb(path, batch=batch, threads=threads),
            agreement=near[path].percent if path in near else None,
            sqnr_db=near[path].sqnr_db if path in near else None,
            compared=length(images) if path in near else 0,
        )
        for path, top1, t in zip(paths, top1s, times, strict=True)
    ]


def interleave(
    runners: Sequence[Callable[[], object]],
    *,
    runs: int,
    warmup: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> NDArray[np.float64]:
    """Seconds that each runner took in each round, `[runners, runs]`.

    Args:
        runners: called once a round, in an order that rotates by one from round to round.
        runs: rounds that count.
        warmup: rounds before, dropped. None: a tenth of `runs`, at least 5.
        clock: what tells the seconds. `time.thread_time` leaves out the time in which a busy
            machine ran something else, for runners that stay on their thread.
    """
    warmup = max(5, runs // 10) if warmup is None else warmup
    times = np.zeros((len(runners), warmup + runs))
    collecting = gc.isenabled()
    gc.disable()  # a collection would fall on one runner only
    try:
        for r in range(warmup + runs):
            for k in range(len(runners)):
                i = (k + r) % len(runners)
                start = clock()
                runners[i]()
                times[i, r] = clock() - start
    finally:
        if collecting:
            gc.enable()
    return times[:, warmup:]


def top1(path: Path, images: Samples, labels: Array, normalize: Normalization | None) -> float:
    """Percent of `images` that a model file puts in the class of `labels`.

    Args:
        path: the file.
        images: uint8 `[n, H, W, C]`, or arrays by name of input.
        labels: `[n]`.
        normalize: of images.

    Raises:
        DataError: no normalization for a file that takes floats, or other images than it takes.
    """
    loaded, hits = runtime.session(path), 0
    values = _values(rows(images, slice(1)))
    step = max(1, min(_CHUNK, _VALUES // values))
    for start in range(0, len(labels), step):
        part = rows(images, slice(start, start + step))
        found = runtime.answers(loaded, feed_of(loaded, part, normalize, path))
        logits = next(iter(found.values())).reshape(length(part), -1)
        if labels.max() >= logits.shape[1]:
            raise DataError(
                f"{path} tells {logits.shape[1]} classes apart, but the data set has labels up to "
                f"{labels.max()}. Name the data it was trained on with --data."
            )
        hits += int((logits.argmax(1) == labels[start : start + step]).sum())
    return 100 * hits / len(labels)


def _values(samples: Samples) -> int:
    arrays = samples.values() if isinstance(samples, Mapping) else [samples]
    return sum(array.size for array in arrays)


def file_bytes(path: Path) -> int:
    """Bytes on disk of a model file together with the external data it points to."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    graph = onnx.load(path, load_external_data=False).graph
    outside = {
        path.parent / entry.value
        for tensor in graph.initializer
        if uses_external_data(tensor)
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(os.path.getsize(p) for p in (path, *outside))


def peak_mb(path: Path, *, batch: int, threads: int) -> float | None:
    """Peak resident memory in MB of a fresh process that loads the file and runs it once."""
    command = [sys.executable, "-P", runtime.__file__, str(path), str(batch), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        logger.warning("memory of %s could not be measured: %s", path, done.stderr.strip()[-300:])
        return None
    return float(json.loads(done.stdout)["peak_mb"])


_CHUNK = 2000  # images normalized at a time, at most
_VALUES = 2**25  # and so many values


def _unique(paths: Sequence[Path]) -> list[Path]:
    if not paths:
        raise UsageError("at least one model file is needed. Got none.")
    first: dict[Path, Path] = {}
    for path in paths:
        first.setdefault(path.resolve(), path)
    return list(first.values())


def _normalizations(
    paths: Sequence[Path], normalize: Normalization | None
) -> dict[Path, Normalization | None]:
    """What each file's float input is normalized with, or None where nothing is known."""
    given = {p: file_info(p).normalize for p in paths}
    known = [Normalization.parse(text) for text in given.values() if text]
    other = normalize or (known[0] if known else None)
    return {p: normalize or (Normalization.parse(t) if t else other) for p, t in given.items()}


def _measure_top1(
    path: Path,
    images: Samples | None,
    labels: Array | None,
    normalize: Normalization | None,
    say: Callable[[str], None],
) -> float | None:
    if images is None or labels is None:
        return None
    say(f"accuracy of {path}")
    return round(top1(path, images, labels, normalize), 2)


def runner(path: Path, *, threads: int, batch: int) -> Callable[[], object]:
    """A loaded file as a function of nothing: one run on random images of a fixed seed.

    Raises:
        UsageError: the file is fixed to another batch.
    """
    loaded = runtime.session(path, threads=threads)
    fixed = runtime.fixed_batch(loaded)
    if fixed and fixed != batch:
        raise UsageError(f"{path} runs {fixed} images at a time; --batch must be that.")
    feeds = runtime.noise(loaded, batch)
    return lambda: loaded.run(None, feeds)
