"""`mpq targets`: where a file can be made to run, what it stores for that, how it is proven."""

from __future__ import annotations

import click

from mpq.cli import options, terminal
from mpq.report.grid import Grid, columns
from mpq.target import Target
from mpq.targets import TARGETS, this_target


@click.command()
@options.as_json
def targets(as_json: bool) -> None:
    """List the targets: what each stores, what it runs as integers, and how a file is proven.

    `--target` of analyze and export takes one, or several with commas between: the file then
    serves all of them.

    \b
    mpq analyze model.pth --target arm64,wasm
    """
    rows = [_row(target) for target in TARGETS.values()]
    heads = columns("target", "where", "needs", "bits", "4 bits as", "8-bit weights", "proven by")
    short = ", ".join(t.short for t in TARGETS.values() if t.short)
    note = (
        f"Short names: {short}. This computer is {this_target().name}. Up to 8 bits run as "
        "integers, 16 in float. 'reference': every integer is predicted bit for bit, without that "
        "CPU at hand; 'runtime': by running it there (mpq portability)."
    )
    cells = tuple(tuple(row.values()) for row in rows)
    terminal.result(as_json, {"rows": rows}, Grid("Targets", heads, cells, note))


def _row(target: Target) -> dict[str, str]:
    stored = sorted(target.widths)
    spans = f"{stored[0]} to 8, 16" if 3 in stored else ", ".join(map(str, stored))
    return {
        "target": target.name,
        "where": target.about,
        "needs": target.needs,
        "bits": spans,
        "int4": ", ".join(sorted(target.int4_formats)),
        "int8": "in 7 bits" if target.saturates else "in 8 bits",
        "proven": "reference" if target.arithmetic else "runtime",
    }
