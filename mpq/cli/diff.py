"""`mpq diff`: what two policies differ in."""

from __future__ import annotations

import json
from pathlib import Path

import click

from mpq.cli import options
from mpq.compare import compare
from mpq.policy import Policy
from mpq.report.tables import diff_table


@click.command()
@click.argument("a", type=click.Path(path_type=Path))
@click.argument("b", type=click.Path(path_type=Path))
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
    paths = [options.in_run(path, "policy.yaml") for path in (a, b)]
    found = compare(Policy.load(paths[0]), Policy.load(paths[1]))
    content = found.to_json()
    if as_json:
        click.echo(json.dumps({"a": str(paths[0]), "b": str(paths[1]), **content}))
    elif found.changes:
        names = str(paths[0]), str(paths[1])
        options.stdout.print(diff_table(content["changes"], content, names))
    else:
        options.show(f"{paths[0]} and {paths[1]} give every layer the same widths")
    return int(exit_code and bool(found.changes))
