"""`mpq demo`: the whole pipeline on embedded data."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from mpq import rundir
from mpq.cli import options, places, terminal
from mpq.pipeline.demo import run_demo
from mpq.report.trained import demo_table


@click.command()
@options.seed
@options.as_json
@options.force
@options.out("Run folder to write to.  [default: runs/demo]")
def demo(seed: int, as_json: bool, force: bool, out: Path | None) -> None:
    """Train, distil, analyze, quantize, export and measure on the embedded digits.

    Takes 2 to 3 minutes on two cores and needs no data and no network.
    """
    folder = places.hold(rundir.resolve_out(out, "demo"))
    rundir.refuse_overwrite(folder / "demo.json", force)
    rundir.touch_run(folder)
    with terminal.status() as tell:
        if not terminal.stderr.is_terminal:
            tell = terminal.say
        rows = run_demo(folder, seed=seed, tell=tell)
    shown = [asdict(row) for row in rows]
    terminal.result(as_json, {"rows": shown}, demo_table(shown))
    if not as_json:
        terminal.say(
            f"wrote {folder}: demo.json, policy.yaml, sensitivity.png, pareto.png and a run for "
            f"each configuration; next: mpq report {folder}"
        )
