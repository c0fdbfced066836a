"""`mpq bench`: model files side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import click

from mpq import origins, rundir
from mpq.cli import bundles, ends, options, places, terminal
from mpq.data import DataSource, Normalization
from mpq.export.bench import BenchRow, Timing
from mpq.pipeline.benching import Benching, float_beside, run_bench
from mpq.pipeline.wishes import Wishes
from mpq.policy import OutputKind
from mpq.report.tables import bench_table


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
@options.num_test("all")
@bundles.wishes
@ends.outputs
@options.seed
@options.as_json
@options.out("Run folder for bench.jsonl.  [default: the run of the first file]")
def bench(
    files: tuple[Path, ...],
    float_file: Path | None,
    source: DataSource,
    normalize: Normalization | None,
    threads: int | None,
    batch: int,
    runs: int,
    peers: bool,
    num_test: int | None,
    wishes: Wishes,
    outputs: dict[str, OutputKind],
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
    paths = [places.in_run(path, "model.onnx") for path in files or [out]]
    folder = out or (paths[0].parent if rundir.is_run(paths[0].parent) else None)
    if folder is not None:
        places.hold(folder)
    paths = [places.onnx_file(path) for path in paths]
    reference = places.onnx_file(float_file, "float.onnx") if float_file else float_beside(paths[0])
    for path in [*paths, *([reference] if reference else [])]:
        origins.require(path)
    how = Benching(
        float_file=reference,
        normalize=normalize,
        timing=Timing(threads or 1, batch, runs),
        peers=peers and (folder / "peers" if folder else True),
        limit=num_test,
        seed=seed,
        wishes=wishes,
        outputs=outputs,
    )
    with terminal.status() as tell:
        found = run_bench(paths, source, how, tell=tell, say=terminal.say)
    _show(found.rows, as_json, folder)


def _show(rows: Sequence[BenchRow], as_json: bool, folder: Path | None) -> None:
    text = "".join(f"{row.to_json()}\n" for row in rows)
    if folder is not None:
        origins.keep(folder, "bench.jsonl", text, "bench", [Path(row.file) for row in rows])
    shown = [json.loads(line) for line in text.splitlines()]  # rounded, as the file has them
    terminal.result(as_json, {"rows": shown}, bench_table(shown))
    if folder is not None and not as_json:
        terminal.say(f"wrote {folder / 'bench.jsonl'}")
        terminal.hint(folder)
