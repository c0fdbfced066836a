"""`mpq report`: one HTML page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path

import click

from mpq.cli import options, places, terminal
from mpq.errors import UsageError


@click.command()
@click.argument("runs", metavar="[RUN]...", nargs=-1, type=options.PATH)
@click.option("--compare", is_flag=True, help="One page of several runs: compare.html beside them.")
@options.as_json
def report(runs: tuple[Path, ...], compare: bool, as_json: bool) -> None:
    """Write RUN/report.html: one self-contained page of all that the run holds.

    RUN is a run or a file in it; without it, the newest. The page is made from the files of the
    run, and made anew each time.

    \b
    mpq report
    mpq report runs/a
    mpq report --compare runs/a runs/b
    """
    # matplotlib and bokeh take a second to import, which `--help` need not wait for.
    from mpq.pipeline.reporting import report_run, report_runs

    if not compare and len(runs) > 1:
        raise UsageError(f"one run makes one page. Got {len(runs)}; compare them by --compare.")
    folders = [places.run(run) for run in runs or (() if compare else (None,))]
    path = report_runs(folders) if compare else report_run(folders[0])
    terminal.result(as_json, {"file": str(path)}, f"wrote {path}")
