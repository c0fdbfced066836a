"""One file in every runtime on this computer: does it load, run as integers, answer the same?

Each answer is held against the integer reference of the runtime's own arithmetic, which must agree
in every bit, and against that of x86, which must agree in the class. Speed is that of one image,
relative to the float file in the same runtime. A runtime that refuses the file or crashes is a row
that says so; the others still run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from mpq.errors import ExportError
from mpq.noise import EXACT_DB
from mpq.numerics import decibels
from mpq.target import Arithmetic

from . import foreign, runtime
from .executed import INTEGER_OPS, MATRIX, constant_roots, executions, weight_of
from .feeds import Feed, feeds
from .fileinfo import file_info
from .foreign import Foreign, Job, Result
from .reference import BATCH, Reference

Array = NDArray[Any]
Outputs = dict[str, Array]
RUNS = 20
"""Timed runs of one image; the median counts."""


@dataclass(frozen=True, slots=True)
class Row:
    """A file in one runtime.

    Args:
        runtime: name.
        version: of it; empty where it is not installed or did not answer.
        problem: why there is no answer: not installed (and how to), refused, crashed.
        install: the command that installs it, where it is missing.
        integer: layers that run as integers; None where the runtime does not tell.
        layers: of all.
        n: images.
        predicted: images whose logits equal its own reference in every bit; None without one.
        same_class: images of the class that the reference of x86 gives; None where the first output
            is no class.
        top1: percent of the labels, None without labels.
        ms: milliseconds of one image; None on an emulated CPU.
        ratio: times faster than the float file in this runtime; None without one.
        sqnr_db: of all floats that come out, against the reference of x86, in dB, at most 999; None
            where the first output is a class.
    """

    runtime: str
    version: str = ""
    problem: str = ""
    install: str = ""
    integer: int | None = None
    layers: int | None = None
    n: int = 0
    predicted: int | None = None
    same_class: int | None = None
    top1: float | None = None
    ms: float | None = None
    ratio: float | None = None
    sqnr_db: float | None = None


@dataclass(frozen=True, slots=True)
class Portability:
    """A file in every runtime: the contents of `portability.json`."""

    file: str
    n: int
    rows: tuple[Row, ...]

    def to_json(self) -> str:
        """The contents of `portability.json`."""
        return json.dumps(asdict(self), indent=1)


def portability(
    file: Path,
    images: Feed,
    *,
    labels: Array | None = None,
    float_file: Path | None = None,
    runtimes: Sequence[Foreign] | None = None,
    runs: int = RUNS,
    progress: Callable[[str], None] = lambda _: None,
) -> Portability:
    """Run a file in each runtime.

    Args:
        file: an ONNX file.
        images: one array of them as the file takes them, or an array for each of its inputs.
        labels: int64 `[n]`, or None.
        float_file: what speed is relative to, fed noise if it takes something else.
        runtimes: which; None: all that are known, installed or not.
        runs: timed runs of one image.
        progress: called with what is being run.

    Raises:
        ExportError: the runtime of this Python cannot load the file.
        DataError: the inputs are not what it takes.
    """
    loaded = runtime.session(file)
    given, step = feeds(loaded, images), runtime.fixed_batch(loaded)
    n = max((len(x) for x in given.values() if x.ndim), default=0)
    job = Job(given, step or BATCH, step or 1)
    classes = _is_class(file, loaded)
    references: dict[Arithmetic, Outputs] = {}

    def reference(kind: Arithmetic) -> Outputs:
        if kind not in references:
            progress(f"integer reference of {kind}")
            references[kind] = Reference(kind).answers(file.read_bytes(), given)
        return references[kind]

    rows = []
    for there in foreign.runtimes() if runtimes is None else runtimes:
        if not there.there:
            command = f"mpq portability --install {there.install}"
            rows.append(Row(there.name, problem=f"not installed: {command}", install=command))
            continue
        progress(there.name)
        try:
            timed = 0 if there.emulated else runs
            done = foreign.run(there, file, replace(job, runs=timed))
            times = _float_seconds(there, float_file, timed)
        except ExportError as error:
            rows.append(Row(there.name, problem=str(error)))
            continue
        own = None if there.arithmetic is None else reference(there.arithmetic)
        row = _row(there, file, done, times)
        rows.append(_compared(row, done, (own, reference("x86")), classes, labels))
    return Portability(file.name, n, tuple(rows))


def _is_class(file: Path, loaded: runtime.Session) -> bool:
    """Whether the first output gives a class, as the file says or by its shape."""
    first = loaded.get_outputs()[0]
    said = (file_info(file, loaded).outputs or {}).get(first.name)
    return said == "classes" if said else len(first.shape) == 2 and first.type == "tensor(float)"


def _row(there: Foreign, file: Path, done: Result, float_seconds: float | None) -> Row:
    """What a runtime tells of itself."""
    seconds = float(np.median(done.seconds)) if done.seconds else None
    integer, layers = done.layers or _integers(file, done.optimized)
    return Row(
        there.name,
        done.version.partition("-")[0],
        integer=integer,
        layers=layers,
        ms=None if seconds is None else round(1e3 * seconds, 4),
        ratio=round(float_seconds / seconds, 3) if float_seconds and seconds else None,
    )


def _compared(
    row: Row,
    done: Result,
    references: tuple[Outputs | None, Outputs],
    classes: bool,
    labels: Array | None,
) -> Row:
    """The row with how its answers compare with the references, its own and that of x86."""
    own, common = references
    # Runtimes name outputs as they like; all give them in the order of the file.
    found = [
        x.reshape(y.shape) for x, y in zip(done.outputs.values(), common.values(), strict=True)
    ]
    n = len(found[0])
    equal = None
    if own is not None:
        pairs = zip(found, own.values(), strict=True)
        equal = np.all([(a == b).reshape(n, -1).all(1) for a, b in pairs], axis=0)
    row = replace(row, n=n, predicted=None if equal is None else int(equal.sum()))
    if not classes:
        return replace(row, sqnr_db=_sqnr(found, list(common.values())))
    best = found[0].reshape(n, -1).argmax(1)
    wanted = next(iter(common.values())).reshape(n, -1).argmax(1)
    top1 = None if labels is None else round(100 * float((best == labels).mean()), 2)
    return replace(row, same_class=int((best == wanted).sum()), top1=top1)


def _sqnr(found: Sequence[Array], wanted: Sequence[Array]) -> float | None:
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if b.dtype.kind == "f"]
    if not pairs:
        return None
    noise = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in pairs)
    power = sum(float(np.square(b, dtype=np.float64).sum()) for _, b in pairs)
    return round(min(EXACT_DB, decibels(power, noise)), 1) if power else EXACT_DB


def _integers(file: Path, optimized: bytes | None) -> tuple[int | None, int | None]:
    """Layers that an onnxruntime runs as integers, of all, where it told the graph that it ran."""
    graph = onnx.load(file, load_external_data=False).graph
    roots = constant_roots(graph)
    layers = [n for n in graph.node if n.op_type in MATRIX and weight_of(n) in roots]
    if optimized is None:
        return None, len(layers)
    found = executions(graph, onnx.load_from_string(optimized).graph)
    return sum(run.op in INTEGER_OPS for run in found), len(layers)


def _float_seconds(there: Foreign, float_file: Path | None, runs: int) -> float | None:
    """Median seconds of the float file in this runtime; None without one."""
    if float_file is None or not runs:
        return None
    noise = runtime.noise(runtime.session(float_file), 1)
    found = foreign.run(there, float_file, Job(noise, runs=runs))
    return float(np.median(found.seconds))
