"""Verbs on files: `export`, `bench`, `certify`, `verify`, `diagnose`, `report`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, from_numpy

from mpq import origins, rundir
from mpq.calls import Inputs, leaves, refill
from mpq.data import DataSource, Normalization
from mpq.diagnose import Diagnosis
from mpq.errors import UsageError
from mpq.export import ExportResult, to_onnx
from mpq.export.bench import Timing
from mpq.export.certify import Certificate
from mpq.export.certify import certify as judge
from mpq.export.ends import Asked
from mpq.export.exact import ExactReport
from mpq.export.fileinfo import file_info
from mpq.export.form import Int4Format
from mpq.export.verify import VerifyReport
from mpq.graph.ir import QuantGraph
from mpq.inputs import InputSpec
from mpq.pipeline.anything import gather_inputs
from mpq.pipeline.benching import Bench, Benching, run_bench
from mpq.pipeline.diagnosing import Result, diagnose_results, diagnose_run
from mpq.pipeline.exporting import Exporting, PixelLayout, export_file
from mpq.pipeline.given import Data, as_batches, gather
from mpq.pipeline.quantizing import Quantized, load_quantized
from mpq.pipeline.verifying import exact_run, verify_run
from mpq.pipeline.wishes import Wishes
from mpq.policy import OutputKind

VERIFIED = 1000


def export(
    quantized: Quantized | QuantGraph | str | Path,
    path: str | Path = "model.onnx",
    *,
    data: Data | None = None,
    num_test: int | None = None,
    allow_float_fallback: bool = False,
    int4_format: Int4Format | None = None,
    min_runtime: str | None = None,
    input: Literal["float", "uint8"] = "float",
    layout: PixelLayout = "nhwc",
    target: str | None = None,
    input_names: Sequence[str] = (),
    output_names: Sequence[str] = (),
    dynamic_axes: Sequence[str] = (),
    outputs: Mapping[str, OutputKind] | None = None,
    seed: int = 0,
    force: bool = False,
) -> ExportResult:
    """Write one ONNX file, verified and certified, as `mpq export` does.

    Args:
        quantized: what `ptq` or `qat` gave, or its file, or a run: the newest that is not stale.
        path: the file to write.
        data: images to verify on. None: those that `quantized` was measured on.
        num_test: how many of them. None: 1000.
        allow_float_fallback: accept layers that run in float against the policy.
        int4_format: storage of 4-bit weights; None: what `min_runtime` takes.
        min_runtime: the oldest onnxruntime that must run the file.
        input: what the file takes: `float` images, or `uint8` pixels.
        layout: of pixels.
        target: the kind of CPU to certify for; None: that of this computer.
        input_names: of the file's inputs; empty: the network's own.
        output_names: of the file's outputs; empty: the network's own.
        dynamic_axes: sizes left free, of `batch`, `length`, `depth`, `height` and `width`; empty:
            the batch.
        outputs: kinds of outputs by name, by which the file is judged, over those it has.
        seed: of the sample.
        force: replace a file that exists.

    Raises:
        ExportError: the file breaks a promise; nothing is written.
        UsageError: the file exists and `force` is off, or its name is that of another kind.
    """
    rundir.require_kind(Path(path), ".onnx")
    rundir.refuse_overwrite(Path(path), force)
    count = VERIFIED if num_test is None else num_test
    ends = Asked(
        input_names=tuple(input_names),
        output_names=tuple(output_names),
        dynamic=tuple(dynamic_axes),
    )
    form = Exporting(
        int4_format=int4_format,
        min_runtime=min_runtime,
        pixels=layout if input == "uint8" else None,
        target=target,
        allow_float_fallback=allow_float_fallback,
        ends=ends,
    )
    if isinstance(quantized, QuantGraph):
        if form.pixels is not None:
            raise UsageError(
                "a graph does not say how pixels are normalized. Export what mpq.ptq gave."
            )
        return to_onnx(
            quantized,
            path,
            images=None if data is None else _inputs(data, count, seed, quantized),
            allow_float_fallback=allow_float_fallback,
            int4_format=int4_format,
            min_runtime=min_runtime,
            target=target,
            **ends,
        )
    named = data if isinstance(data, str | Path) else None
    found = _quantized(quantized, named).judged_as(outputs or {})
    images = None
    if data is not None and named is None:
        images = _inputs(data, count, seed, found.graph)
    return export_file(found, Path(path), form, count=count, seed=seed, images=images)


def bench(
    files: str | Path | Iterable[str | Path],
    data: Data | None = None,
    *,
    float_file: str | Path | None = None,
    normalize: str = "",
    threads: int = 1,
    batch: int = 1,
    runs: int = 200,
    peers: bool = False,
    num_test: int | None = None,
    metric: Any = None,
    postprocess: Callable[[Any], Any] | str | None = None,
    lower_is_better: bool = False,
    outputs: Mapping[str, OutputKind] | None = None,
    seed: int = 0,
) -> Bench:
    """Accuracy, latency, size and memory of ONNX files beside the float model, as `mpq bench` does.

    Args:
        files: ONNX files.
        data: images and class ids to measure accuracy on, or inputs to compare the answers of the
            files with those of the float file on. None: the data that the files name; `none`: only
            latency, size and memory are measured.
        float_file: what speed refers to. None: `float.onnx` beside the first file.
        normalize: of pixels, where the files do not say.
        threads: threads inside an operation.
        batch: images at a time.
        runs: rounds timed.
        peers: also onnxruntime's own static and dynamic int8 of the float model; of data by name.
        num_test: images at most; None: all.
        metric: to measure besides top-1, on the batches of `data` (`mpq.metrics.given`).
        postprocess: what is applied to the outputs before they are judged.
        lower_is_better: of a metric that does not say so itself.
        outputs: kinds of outputs by name, over what the files say.
        seed: of the sample.

    Raises:
        UsageError, DataError: files or data that are missing or do not fit.
    """
    how = Benching(
        float_file=None if float_file is None else Path(float_file),
        normalize=Normalization.parse(normalize) if normalize else None,
        timing=Timing(threads, batch, runs),
        peers=peers,
        limit=num_test,
        seed=seed,
        wishes=Wishes(metric, lower_is_better, postprocess, as_batches(data)),
        outputs=outputs or {},
    )
    source: Any = DataSource(None if data is None else str(data))
    several = [_fresh(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if data is not None and not isinstance(data, str | Path):
        takes = file_info(several[0]).inputs
        source = (gather_inputs(data, takes, num_test, seed) if takes
                  else gather(data, num_test, seed))  # fmt: skip
    return run_bench(several, source, how)


def certify(file: str | Path, *, target: str | None = None) -> Certificate:
    """What onnxruntime makes of any ONNX file, as `mpq certify` does.

    Args:
        file: an ONNX file.
        target: the kind of CPU to judge for; None: that of this computer.

    Raises:
        ExportError: the runtime cannot load it.
    """
    return judge(_fresh(file), target=target)


def verify(
    file: str | Path,
    quantized: Quantized | str | Path | None = None,
    *,
    exact: bool = False,
    data: str | Path | None = None,
    num_test: int | None = None,
    target: str | None = None,
    outputs: Mapping[str, OutputKind] | None = None,
    seed: int = 0,
) -> VerifyReport | ExactReport:
    """Whether a file answers as its network does, or as integers must, as `mpq verify` does.

    Args:
        file: an ONNX file.
        quantized: what it was made from. None: the one beside the file.
        exact: predict every integer tensor of the runtime; needs nothing but the file.
        data: images by name. None: those that the file or `quantized` name.
        num_test: how many images. None: 1000, with `exact` 4.
        target: where to judge it, without that CPU at hand; None: on this computer.
        outputs: kinds of outputs by name, over those that the file was judged by.
        seed: of the sample.

    Raises:
        DataError, ExportError: no images, or a file that does not run.
    """
    if exact:
        source = DataSource(None if data is None else str(data))
        return exact_run(_fresh(file), source, images=num_test or 4, seed=seed, target=target)
    found = _quantized(quantized or origins.network_of(Path(file)), data)
    return verify_run(
        found, _fresh(file), images=num_test or 1000, seed=seed, target=target, outputs=outputs
    )


def diagnose(*results: str | Path | Result, data: str | Path | None = None) -> Diagnosis:
    """What is wrong, why, and what to try, as `mpq diagnose` says it.

    Args:
        results: a run folder, or a file in one: it gets `diagnosis.json`. Or what `analyze`,
            `export`, `certify` and `bench` gave, together.
        data: images by name, for a run whose tensors have not been looked at. None: those that its
            policy names.

    Raises:
        UsageError: neither a run nor a result, or a run beside others.
    """
    given = [one for one in results if isinstance(one, Result)]
    if len(given) == len(results) and given:
        return diagnose_results(given)
    if len(results) != 1 or given:
        raise UsageError(
            "diagnose takes one run, or what analyze, export, certify and bench gave. Got "
            f"{', '.join(type(one).__name__ for one in results) or 'nothing'}."
        )
    path = Path(str(results[0]))
    source = DataSource(None if data is None else str(data))
    return diagnose_run(path if path.is_dir() else path.parent, source)


def report(*runs: str | Path, compare: bool = False) -> Path:
    """Write `report.html` into a run folder, as `mpq report` does, and return its path.

    Args:
        runs: the folder; with `compare`, two or more.
        compare: write one page of several runs instead, `compare.html` beside the first.

    Raises:
        UsageError: it is no run, or one too many.
    """
    from mpq.pipeline.reporting import report_run, report_runs  # bokeh: a second of import

    if compare:
        return report_runs([Path(run) for run in runs])
    if len(runs) != 1:
        raise UsageError(
            f"report makes a page of one run, or of several by compare. Got {len(runs)}."
        )
    return report_run(Path(runs[0]))


def _quantized(found: Quantized | str | Path, data: str | Path | None) -> Quantized:
    if isinstance(found, Quantized):
        return found
    path = origins.find_quantized(Path(found))
    return load_quantized(_fresh(path), DataSource(None if data is None else str(data)))


def _fresh(file: str | Path) -> Path:
    """A file, unless it is one of a run and stale there."""
    path = Path(file)
    origins.require(path)
    return path


def _inputs(data: Data, count: int, seed: int, graph: QuantGraph) -> Inputs:
    """Data given as values, as a graph is called with them."""
    if isinstance(graph.example, Tensor) and graph.example.ndim == 4:
        return from_numpy(gather(data, count, seed)[0]).permute(0, 3, 1, 2).contiguous()
    takes = {name: InputSpec.of(t) for name, t in leaves(graph.example, "input").items()}
    arrays, _ = gather_inputs(data, takes, count, seed)
    inputs: Inputs = refill(graph.example, map(from_numpy, arrays.values()))
    return inputs
