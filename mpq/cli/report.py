"""`mpq report`: one HTML page of a run."""

from __future__ import annotations

from pathlib import Path

import click

from mpq import rundir
from mpq.cli import options, places, terminal


@click.command()
@click.argument("run", required=False, type=options.PATH)
@options.as_json
def report(run: Path | None, as_json: bool) -> None:
    """Write RUN/report.html: one self-contained page of all that the run holds.

    RUN is a run or a file in it; without it, the newest. The page is made from the files of the
    run, and made anew each time.
    """
    # matplotlib takes a second to import, which `--help` need not wait for.
    from mpq.report.page import write_page

    folder = places.newest("policy.yaml") if run is None else rundir.run_folder(run)
    if run is None:
        terminal.say(f"no run named: using {folder}")
    rundir.tidy(folder)
    if folder.is_dir():
        rundir.refuse_overwrite(folder / "report.html", force=True)
    path = write_page(folder)
    terminal.result(as_json, {"report": str(path)}, f"wrote {path}")
