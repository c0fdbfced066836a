"""`mpq doctor`: what this computer has, what it will run as integers, and what is missing."""

from __future__ import annotations

import click

from mpq.cli import options, terminal
from mpq.pipeline.doctor import Health, examine
from mpq.report.grid import Grid, columns


@click.command()
@options.as_json
def doctor(as_json: bool) -> None:
    """Show versions, CPU, target, threads and data places, and what is missing for which command.

    Something missing is no failure: the exit code is 0.

    \b
    mpq doctor
    mpq doctor --json
    """
    found = examine()
    shown = [_computer(found)]
    if found.missing:
        rows = tuple((one.what, one.needed_for, one.mend) for one in found.missing)
        shown.append(Grid("What is missing", columns("what", "needed for", "what to do"), rows))
    terminal.result(as_json, found.to_json(), *shown)


def _computer(found: Health) -> Grid:
    versions = ", ".join(f"{name} {version or '-'}" for name, version in found.versions.items())
    threads = found.threads
    openmp = [
        f"{key.upper()}={threads[key] or 'not set'}"
        for key in ("omp_num_threads", "omp_wait_policy")
    ]
    rows = (
        ("mpq", f"{found.mpq}, Python {found.python}"),
        ("packages", versions),
        ("CPU", f"{found.cpu}; {' '.join(found.flags) or 'none of the flags that matter'}"),
        ("target", found.target),
        ("as integers", found.integers),
        ("GPU", found.gpu or "none"),
        ("threads", f"{threads['allowed']} of {threads['cpus']} CPUs; {', '.join(openmp)}"),
        ("data", f"{', '.join(found.data['found'])}; looked in {', '.join(found.data['places'])}"),
        ("cache", found.cache),
    )
    return Grid("This computer", columns("what", "found"), rows)
