"""`mpq export`: one verified and certified file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click

from mpq import origins, rundir
from mpq.cli import bundles, ends, options, places, terminal
from mpq.data import DataSource
from mpq.export import ExportResult
from mpq.export.ends import Asked
from mpq.export.form import INT4_FORMATS, Int4Format
from mpq.pipeline.exporting import (
    Exporting,
    PixelLayout,
    export_run,
    float_reference,
    refuse_export,
)
from mpq.pipeline.quantizing import load_quantized
from mpq.policy import OutputKind
from mpq.report.grid import agreement_text, counted


@click.command()
@click.argument("run", required=False, type=options.PATH)
@options.origin
@click.option("--onnx", is_flag=True, expose_value=False, help="Write ONNX, the one format.")
@options.num_test("1000, of large networks 128 and more; 0: not verified", least=0)
@click.option("--allow-float-fallback", is_flag=True,
              help="Accept layers that run in float against the policy.")  # fmt: skip
@options.choice("--int4-format", INT4_FORMATS,
                help="Storage of 4-bit weights; dq is for other runtimes.  [default: cast, or "
                "unpack for a --min-runtime below 1.23]")  # fmt: skip
@click.option("--min-runtime", metavar="VERSION",
              help="The oldest onnxruntime that must run the file.  [default: 1.23]")  # fmt: skip
@click.option("--input", "kind", type=click.Choice(("float", "uint8")), default="float",
              show_default=True, help="What the file takes: float images or pixels.")  # fmt: skip
@options.choice("--layout", get_args(PixelLayout), default="nhwc", help="Of raw pixels.")
@options.names("--input-names", "Of the file's inputs.  [default: the network's own]")
@options.names("--output-names", "Of the file's outputs.  [default: the network's own]")
@options.names("--dynamic-axes", "Sizes left free, of batch, length, depth, height, width; the "
               "file is verified at several.  [default: batch]")  # fmt: skip
@ends.outputs
@options.target("The kind of CPU to certify for.")
@bundles.source
@options.trust_pickle
@options.seed
@options.as_json
@options.force
@options.out("Run folder to write to.  [default: RUN]")
def export(
    run: Path | None,
    origin: str | None,
    num_test: int | None,
    allow_float_fallback: bool,
    int4_format: Int4Format | None,
    min_runtime: str | None,
    kind: str,
    layout: PixelLayout,
    input_names: tuple[str, ...],
    output_names: tuple[str, ...],
    dynamic_axes: tuple[str, ...],
    outputs: dict[str, OutputKind],
    target: str | None,
    source: DataSource,
    trust_pickle: bool,
    seed: int,
    as_json: bool,
    force: bool,
    out: Path | None,
) -> None:
    """Write model.onnx of a quantized network, prove what it does, write float.onnx beside it.

    RUN is a run, or a file in it, such as its ptq.pth or qat.pth; without it, the newest.

    \b
    mpq export
    mpq export runs/r20 --from ptq
    mpq export runs/r20/qat.pth -o runs/r20-file
    """
    path = places.quantized(run, origin)
    folder = places.hold(_folder(run, path) if out is None else rundir.resolve_out(out, ""))
    origins.require(path)
    refuse_export(folder, force)
    how = Exporting(
        int4_format=int4_format,
        min_runtime=min_runtime,
        pixels=layout if kind == "uint8" else None,
        target=target,
        allow_float_fallback=allow_float_fallback,
        ends=Asked(input_names=input_names, output_names=output_names, dynamic=dynamic_axes),
    )
    with terminal.status() as tell:
        tell("loading")
        found = load_quantized(path, source, trust_pickle=trust_pickle).judged_as(outputs)
        reference = float_reference(found, path, source, trust_pickle=trust_pickle)
        tell("exporting and verifying")
        result = export_run(
            found, folder, how, images=num_test, seed=seed, reference=reference, force=force
        )
    terminal.result(as_json, _summary(result, path), *_told(result))
    more = ", float.onnx" if reference is not None else ""
    terminal.say(f"wrote {result.path} from {path}, certificate.json{more}; next: mpq bench")
    terminal.hint(result.path.parent)


def _folder(run: Path | None, path: Path) -> Path:
    """Where the file goes: into the run that is named, else to the network that it is made of."""
    named = None if run is None else rundir.run_folder(run)
    return named if named is not None and named.is_dir() else path.parent


def _summary(result: ExportResult, path: Path) -> dict[str, object]:
    checked = result.verification
    return {
        "file": str(result.path),
        "from": str(path),
        "bytes": result.bytes,
        "integer_macs_fraction": result.certificate.integer_macs_fraction,
        "boundaries": result.certificate.boundaries,
        "needs": result.certificate.needs,
        "top1_agreement": checked.top1_agreement if checked else None,
    }


def _told(result: ExportResult) -> Iterator[str]:
    certificate, checked = result.certificate, result.verification
    boundaries = counted(certificate.boundaries, "precision boundary", "precision boundaries")
    yield (
        f"{result.bytes:,} bytes; {certificate.integer_macs_fraction:.1%} of the MACs run as "
        f"integers, {boundaries}; needs {certificate.needs}"
    )
    yield from certificate.notes
    if checked is None:
        yield "not verified: there are no images to verify on; name some: --data DATA --force"
        return
    images, steps = counted(checked.n, "image"), counted(checked.max_step, "step")
    if checked.top1_agreement is None:
        yield f"{agreement_text(json.loads(checked.to_json()))} on {images}, at most {steps} apart"
        return
    yield (
        f"same class as the simulation on {checked.top1_agreement:.2%} of {images}, "
        f"at most {steps} apart"
    )
