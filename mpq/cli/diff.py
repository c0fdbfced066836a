"""`mpq diff`: what two policies differ in."""

from __future__ import annotations

from pathlib import Path

import click

from mpq.cli import options, places, terminal
from mpq.compare import compare
from mpq.policy import Policy
from mpq.report.grid import Grid
from mpq.report.tables import diff_table


@click.command()
@click.argument("a", type=options.PATH)
@click.argument("b", type=options.PATH)
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the policies differ.")
@options.as_json
def diff(a: Path, b: Path, exit_code: bool, as_json: bool) -> int:
    """What policy B does otherwise than policy A: bits, bytes, BitOps, predicted drop by layer.

    A and B are policy files, or runs that have one. As with git, the exit code is 0 whether they
    differ or not, unless --exit-code is given.

    \b
    mpq diff runs/a/policy.yaml runs/a/policy-6.yaml
    mpq diff runs/a runs/b --json
    """
    paths = [places.in_run(path, "policy.yaml") for path in (a, b)]
    found = compare(Policy.load(paths[0]), Policy.load(paths[1]))
    content, names = found.to_json(), (str(paths[0]), str(paths[1]))
    shown: Grid | str = f"{names[0]} and {names[1]} give every layer the same widths"
    if found.changes:
        shown = diff_table(content["changes"], content, names)
    terminal.result(as_json, {"a": names[0], "b": names[1], **content}, shown)
    return int(exit_code and bool(found.changes))
