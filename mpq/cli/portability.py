"""`mpq portability`: one file in every runtime that this computer has."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpq import origins, rundir
from mpq.cli import bundles, options, places, terminal
from mpq.data import DataSource
from mpq.export import foreign
from mpq.pipeline.benching import float_beside
from mpq.pipeline.verifying import portability_run
from mpq.report.tables import portability_table


@click.command()
@click.argument("file", required=False, type=options.PATH)
@click.option("--install", "installed", multiple=True, metavar="NAME",
              help="Install a runtime first: node, web, openvino, arm64, or a version of "
              "onnxruntime. Below $MPQ_RUNTIMES, nowhere else.")  # fmt: skip
@click.option("--runtime", "names", multiple=True, metavar="NAME",
              help="Only runtimes whose names begin so.  [default: all]")  # fmt: skip
@options.path("--float", "float_file",
              help="What speed is relative to.  [default: float.onnx beside FILE]")  # fmt: skip
@options.num_test("128: emulated CPUs are slow")
@bundles.source
@options.seed
@options.as_json
def portability(
    file: Path | None,
    installed: tuple[str, ...],
    names: tuple[str, ...],
    float_file: Path | None,
    num_test: int | None,
    source: DataSource,
    seed: int,
    as_json: bool,
) -> None:
    """Run FILE in onnxruntime, node, the browser's runtime, on emulated ARM CPUs, in OpenVINO.

    For each: does it load, how many layers run as integers, how many images does the integer
    reference predict bit for bit, is the class the same, how much faster is it than the float file
    there. Without FILE, model.onnx of the newest run. A run keeps portability.json.

    \b
    mpq portability --install web --install arm64
    mpq portability model.onnx --data cifar10
    """
    for name in installed:
        foreign.install(name, terminal.say)
    if installed and file is None:
        return
    path = places.onnx_file(file)
    reference = float_file or float_beside(path)
    wanted = foreign.chosen(names)
    with terminal.status() as tell:
        report = portability_run(
            path,
            source,
            wanted,
            float_file=reference,
            images=num_test or 128,
            seed=seed,
            progress=tell,
        )
    text = report.to_json()
    terminal.result(as_json, text, portability_table(json.loads(text)))
    if path.name == "model.onnx" and rundir.is_run(path.parent):
        places.hold(path.parent)
        origins.keep(path.parent, "portability.json", text + "\n", "portability", [path])
        terminal.say(f"wrote {path.parent / 'portability.json'}")
