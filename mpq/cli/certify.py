"""`mpq certify`: what onnxruntime makes of an ONNX file, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpq import origins
from mpq.cli import options, places, terminal
from mpq.errors import ExportError
from mpq.export.certify import certify as judge
from mpq.report.tables import certificate_table


@click.command()
@click.argument("file", required=False, type=options.PATH)
@options.target("The kind of CPU to judge for.")
@options.as_json
def certify(file: Path | None, target: str | None, as_json: bool) -> None:
    """Show which layers of FILE run as integers in onnxruntime, and which do not.

    Any ONNX file will do; one of mpq is also held against the policy inside it. Without FILE,
    model.onnx of the newest run. Exit code 2 if the file breaks its policy.

    \b
    mpq certify model.onnx
    """
    path = places.onnx_file(file)
    origins.require(path)
    found = judge(path, target=target)
    content = json.loads(found.to_json())
    told = {"file": str(path), **content}
    terminal.result(as_json, told, certificate_table(content), *found.notes)
    if found.broken():
        names = ", ".join(row.name for row in found.broken())
        raise ExportError(f"{path} does not run as its policy asks: {names}.")
