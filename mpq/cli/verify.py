"""`mpq verify`: does a file answer as its quantized network, and are its integers as predicted?"""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpq import origins, rundir
from mpq.cli import bundles, ends, options, places, terminal
from mpq.data import DataSource
from mpq.errors import ExportError, UsageError
from mpq.export.certify import saturating_here
from mpq.export.exact import ExactReport
from mpq.pipeline.quantizing import load_quantized
from mpq.pipeline.verifying import exact_run, verify_run
from mpq.policy import OutputKind
from mpq.report.tables import exact_table, verify_table


@click.command()
@click.argument("file", required=False, type=options.PATH)
@click.option("--exact", is_flag=True,
              help="Predict every integer tensor of the runtime, bit for bit.")  # fmt: skip
@options.origin
@options.num_test("1000, with --exact 4")
@options.target("Where to judge it, without that CPU at hand.")
@ends.outputs
@bundles.source
@options.trust_pickle
@options.seed
@options.as_json
def verify(
    file: Path | None,
    exact: bool,
    origin: str | None,
    num_test: int | None,
    target: str | None,
    outputs: dict[str, OutputKind],
    source: DataSource,
    trust_pickle: bool,
    seed: int,
    as_json: bool,
) -> None:
    """Verify FILE in onnxruntime; without FILE, model.onnx of the newest run.

    By default against the quantized network it was made from: PyTorch, onnxruntime unoptimized
    and at its defaults, end to end and tensor by tensor. With --exact against an integer reference
    that needs nothing but FILE, which may be anybody's. With --target another kind of CPU is
    judged: by the reference of its arithmetic, or with --exact in its own runtime, where
    mpq portability has installed one. In a run, verify.json or exact.json is
    written. Exit code 2 if FILE does not answer as it must.

    \b
    mpq verify
    mpq verify model.onnx --exact
    """
    path = places.onnx_file(file)
    origins.require(path)
    if _keeps(path):
        places.hold(path.parent)
    if exact:
        if origin is not None:
            raise UsageError("--exact needs nothing but the file. Give it without --from.")
        with terminal.status() as tell:
            tell("comparing node by node")
            report = exact_run(path, source, images=num_test or 4, seed=seed, target=target)
        _tell(path, "exact.json", report.to_json(), as_json)
        _refuse_inexact(path, report)
    else:
        network = _origin(path, origin)
        with terminal.status() as tell:
            tell("loading")
            found = load_quantized(network, source, trust_pickle=trust_pickle)
            tell("comparing")
            checked = verify_run(
                found, path, images=num_test or 1000, seed=seed, target=target, outputs=outputs
            )
        _tell(path, "verify.json", checked.to_json(), as_json)
        if checked.failures():
            raise ExportError(
                f"{path} does not answer as {network} does: " + "; ".join(checked.failures())
            )


def _refuse_inexact(path: Path, report: ExactReport) -> None:
    differing = report.differing()
    if differing:
        names = ", ".join(f"{node.op} {node.name}" for node in differing[:5])
        raise ExportError(
            f"{path}: {len(differing)} of {len(report.nodes)} nodes differ from the integer "
            f"reference: {names}. {' '.join(saturating_here(path))}".rstrip()
        )
    if not report.same_output:
        raise ExportError(f"{path}: the runtime's optimized graph answers differently when dumped.")


def _origin(path: Path, origin: str | None) -> Path:
    """The quantized network that a file was made from."""
    if origin is not None:
        return places.quantized(path.parent if origin in rundir.STAGES else None, origin)
    try:
        return origins.network_of(path)
    except UsageError as error:
        raise UsageError(
            f"{path} must be verified against the network it was made from: {error} With --from, "
            "or use --exact, which needs none."
        ) from None


def _keeps(path: Path) -> bool:
    """Whether a report on this file stays in its run."""
    return path.name == "model.onnx" and rundir.is_run(path.parent)


def _tell(path: Path, name: str, text: str, as_json: bool) -> None:
    """Show a report; keep it where the file is the model of a run."""
    table = exact_table if name == "exact.json" else verify_table
    content = json.loads(text)
    terminal.result(as_json, {"file": str(path), **content}, table(content))
    if _keeps(path):
        origins.keep(path.parent, name, text + "\n", "verify", [path])
        terminal.say(f"wrote {path.parent / name}")
