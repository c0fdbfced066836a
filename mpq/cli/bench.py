"""`mpq bench`: model files side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from numpy.typing import NDArray

from mpq import origins, rundir
from mpq.cli import bundles, options, terminal
from mpq.data import DataSet, DataSource, Normalization, load_arrays, open_data, sample_indices
from mpq.errors import UsageError
from mpq.export import peers as peer_tools
from mpq.export.bench import BenchRow, FileInfo, Timing, file_info
from mpq.export.bench import bench as measure
from mpq.report.tables import bench_table

Array = NDArray[Any]
CALIBRATION = 512


@click.command()
@click.argument("files", nargs=-1, type=options.PATH)
@options.path("--float", "float_file", metavar="PATH",
              help="Float model that speed refers to.  [default: float.onnx beside the first file]",
              )  # fmt: skip
@bundles.source
@options.normalize
@options.threads
@options.batch
@options.count("--runs", default=200, help="Rounds timed.")
@click.option(
    "--peers/--no-peers",
    default=False,
    show_default=True,
    help="Also onnxruntime's own static and dynamic int8 of the float model.",
)
@options.count("--limit", help="Test images at most.  [default: all]")
@options.seed
@options.as_json
@options.out("Run folder for bench.jsonl.  [default: the run of the first file]")
def bench(
    files: tuple[Path, ...],
    float_file: Path | None,
    source: DataSource,
    normalize: Normalization | None,
    threads: int,
    batch: int,
    runs: int,
    peers: bool,
    limit: int | None,
    seed: int,
    as_json: bool,
    out: Path | None,
) -> None:
    """Accuracy, latency, size and memory of ONNX FILES beside the float model.

    Without FILES, model.onnx of the newest run. Latency is interleaved: every round runs each
    file once. bench.jsonl is written anew each time.

    \b
    mpq bench a.onnx b.onnx --float float.onnx --data cifar10 --normalize imagenet
    """
    if out is not None:
        out = rundir.resolve_out(out, "")
    paths = [options.in_run(path, "model.onnx") for path in files or [out]]
    reference = float_file or _beside(paths[0])
    for path in [*paths, *([reference] if reference else [])]:
        origins.require(path)
    folder = out or _run_of(paths[0])
    if folder is not None:
        options.hold(folder)
    info = _known([*paths, *([reference] if reference else [])])
    images, labels, dataset = _load(source, info, limit, seed)
    with ExitStack() as stack, terminal.status() as tell:
        if peers:
            tell("onnxruntime's own int8")
            place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            applied = normalize or (Normalization.parse(info.normalize) if info.normalize else None)
            paths += _peers(place / "peers", reference, dataset, applied, seed)
        rows = measure(
            paths,
            float_file=reference,
            images=images,
            labels=labels,
            normalize=normalize,
            timing=Timing(threads, batch, runs),
            progress=tell,
        )
    _show(rows, as_json, folder)


def _beside(path: Path) -> Path | None:
    reference = path.parent / "float.onnx"
    return reference if reference.is_file() else None


def _run_of(path: Path) -> Path | None:
    return path.parent if rundir.is_run(path.parent) else None


def _known(paths: Sequence[Path]) -> FileInfo:
    """What the files say of themselves; where one is silent, the next is asked."""
    infos = [asdict(file_info(path)) for path in paths]
    fields = {key: next((i[key] for i in infos if i[key] is not None), None) for key in infos[0]}
    return FileInfo(**fields)


def _load(
    source: DataSource, info: FileInfo, limit: int | None, seed: int
) -> tuple[Array | None, Array | None, DataSet | None]:
    """Test images and labels, and the data set they are from; no images without labels."""
    name = source.data or info.data
    if name is None:
        raise UsageError(
            "the files do not say which data they were made for. Name it with --data NAME, or "
            "measure latency, size and memory alone with --data none."
        )
    terminal.say(f"data: {name}")
    if name == "none":
        return None, None, None
    dataset = open_data(name, root=source.root, size=info.input[1:] if info.input else None)
    if not dataset.labelled:
        terminal.say("they have no labels: accuracy is not measured")
        return None, None, dataset
    if not len(dataset.test):
        terminal.say("they are too few for a test split: accuracy is not measured")
        return None, None, dataset
    if limit is None or limit >= len(dataset.test):
        images, labels = load_arrays(dataset.test)
        return images, labels, dataset
    picked = sample_indices(dataset.test, limit, seed)
    return dataset.test.read(picked), dataset.test.labels[picked], dataset


def _peers(
    folder: Path,
    reference: Path | None,
    dataset: DataSet | None,
    normalize: Normalization | None,
    seed: int,
) -> list[Path]:
    """The int8 files that onnxruntime itself makes of the float model."""
    if reference is None:
        raise UsageError("--peers quantizes the float model. Name it with --float FILE.")
    if dataset is None or normalize is None:
        raise UsageError(
            "--peers calibrates on training images. Name them with --data, and how they are "
            "normalized with --normalize."
        )
    images = dataset.train.read(sample_indices(dataset.train, CALIBRATION, seed))
    static, dynamic = folder / "ort-static.onnx", folder / "ort-dynamic.onnx"
    return [
        peer_tools.onnxruntime_static(reference, static, normalize.apply(images)),
        peer_tools.onnxruntime_dynamic(reference, dynamic),
    ]


def _show(rows: Sequence[BenchRow], as_json: bool, folder: Path | None) -> None:
    text = "".join(f"{row.to_json()}\n" for row in rows)
    if folder is not None:
        origins.keep(folder, "bench.jsonl", text, "bench", [Path(row.file) for row in rows])
    terminal.result(as_json, text.rstrip("\n"), bench_table([asdict(row) for row in rows]))
    if folder is not None and not as_json:
        terminal.say(f"wrote {folder / 'bench.jsonl'}")
