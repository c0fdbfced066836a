"""`mpq profile`: measured latency of each layer, on this CPU or where the file will run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from mpq import rundir
from mpq.checkpoint import open_model
from mpq.cli import network, options, terminal
from mpq.export.probe import profile_there, read_result, runtime_of, write_probe
from mpq.pipeline.profiling import check as hold
from mpq.pipeline.profiling import graph_of, profile_module
from mpq.report.grid import Grid, columns
from mpq.targets import get_target, this_target


@click.command()
@network.taken
@options.trust_code
@options.threads
@options.batch
@options.target("What is measured: wasm, in node.")
@options.path("--export-probe", metavar="FOLDER",
              help="Write a folder that is to be run on another computer.")  # fmt: skip
@options.path("--import", "imported", metavar="RESULT", help="Read what it measured there.")
@options.path("--check", help="Hold the prediction against this exported file.")
@options.as_json
@click.option("--force", is_flag=True, help="Measure again, and replace profile.json.")
def profile(
    of: network.Network,
    threads: int | None,
    batch: int,
    target: str | None,
    export_probe: Path | None,
    imported: Path | None,
    check: Path | None,
    as_json: bool,
    force: bool,
) -> None:
    """Measure each layer of a network as integers and in float, and what conversions cost.

    The network is CHECKPOINT, or that of a run (or a file in it; without either of the newest run).

    Writes profile.json into the run, which `mpq analyze --max-latency-ms` reads. What was measured
    on this CPU with this onnxruntime is kept and not measured again; a profile.json that says
    something else is replaced with --force only. The machine should be idle.

    \b
    mpq profile model.pth
    mpq profile runs/model --check runs/model/model.onnx
    mpq profile model.pth --target wasm
    mpq profile model.pth --export-probe probe    run probe/probe.py on a device
    mpq profile model.pth --import probe          what it measured
    """
    if export_probe is not None:
        rundir.refuse_overwrite(export_probe / "probe.json", force)
        graph = graph_of(open_model(of.path, of.reading))
        write_probe(graph, export_probe, threads=threads or 1, batch=batch)
        terminal.say(
            f"wrote {export_probe}; next: python3 probe.py in it on the device, which needs "
            f"onnxruntime and numpy, then mpq profile {of.path} --import {export_probe}"
        )
        return
    loaded = open_model(of.path, of.reading)
    kept = of.folder / "profile.json"
    with terminal.status() as tell:
        if imported is not None:
            found = read_result(graph_of(loaded), imported, target=target)
        elif target not in (None, this_target().name):
            place = get_target(target)
            runtime_of(place)
            rundir.refuse_overwrite(kept, force)
            tell(f"measuring for {target}")
            found = profile_there(graph_of(loaded), place, threads=threads or 1, batch=batch)
        else:
            found = profile_module(
                loaded.module,
                loaded.info.input,
                call=loaded.call,
                threads=threads or 1,
                batch=batch,
                again=force,
                on_start=lambda: rundir.refuse_overwrite(kept, force),
                progress=tell,
            )
        if kept.is_file() and kept.read_text(encoding="utf-8") != found.to_json() + "\n":
            rundir.refuse_overwrite(kept, force)  # of another CPU, runtime, batch or threads
        checked = None if check is None else hold(found, check)
    content, notes = json.loads(found.to_json()), []
    if checked is not None:
        content["check"] = {**asdict(checked), "error_percent": checked.error}
        notes.append(
            f"{checked.file}: predicted {checked.predicted_ms:.3f} ms, measured "
            f"{checked.measured_ms:.3f} ms, {checked.error:+.1f} %"
        )
    terminal.result(as_json, content, _table(content), *notes)
    rundir.touch_run(of.folder)
    found.save(kept)
    terminal.say(f"wrote {kept}; next: mpq analyze --max-latency-ms")


def _table(profile: Mapping[str, Any]) -> Grid:
    """What each layer costs as integers and in float: `profile` is `profile.json`."""
    heads = columns("layer", "#integer ms", "#float ms", "#speed", "#conversion ms")
    before: dict[str, float] = {}
    for _, layer, ms in profile["boundary_ms"]:
        before[layer] = before.get(layer, 0.0) + ms
    body = [
        (
            name,
            f"{cost['integer_ms']:.4f}",
            f"{cost['float_ms']:.4f}",
            f"{cost['float_ms'] / cost['integer_ms']:.2f}x" if cost["integer_ms"] else "-",
            f"{before[name]:.4f}" if name in before else "-",
        )
        for name, cost in profile["layers"].items()
    ]
    integer, plain = (
        profile["base_ms"] + sum(cost[key] for cost in profile["layers"].values())
        for key in ("integer_ms", "float_ms")
    )
    note = (
        f"all integer {integer:.3f} ms, all float {plain:.3f} ms; conversion: paid where the layer "
        f"and the one before it are not both integer or both float; {profile['cpu']}, "
        f"{profile['runtime']}, threads: {profile['threads']}, batch: {profile['batch']}"
    )
    return Grid("What each layer costs", heads, tuple(body), note)
