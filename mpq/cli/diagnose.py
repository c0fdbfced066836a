"""`mpq diagnose`: what is wrong with a run, why, and what to try."""

from __future__ import annotations

from pathlib import Path

import click

from mpq.cli import bundles, options, places, terminal
from mpq.data import DataSource
from mpq.errors import UsageError
from mpq.pipeline.diagnosing import diagnose_run


@click.command()
@click.argument("run", required=False, type=options.PATH)
@bundles.source
@options.trust_pickle
@options.as_json
def diagnose(run: Path | None, source: DataSource, trust_pickle: bool, as_json: bool) -> None:
    """Name the problems of RUN: where, why, by which figures, what to try, and what it brings.

    Which layers cost the accuracy and why, why layers do not run as integers, why the file is not
    faster, whether the scores can be trusted. RUN is a run or a file in it; without it, the newest.
    Nothing is measured but what the run lacks: the tensors of its network, on 64 images. Writes
    diagnosis.json.

    \b
    mpq diagnose
    mpq diagnose runs/r20 --json
    """
    folder = places.run(run)
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist. Name a run, or a file in one.")
    places.hold(folder)
    with terminal.status() as tell:
        tell("looking at the files of the run")
        found = diagnose_run(folder, source, trust_pickle=trust_pickle)
    terminal.result(as_json, found.to_json(), *found.shown())
    terminal.say(f"wrote {folder / 'diagnosis.json'}")
