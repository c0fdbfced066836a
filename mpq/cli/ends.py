"""Options of what a network takes and answers with: `--input-shape`, `--output`."""

from __future__ import annotations

import click

from mpq.errors import nearest
from mpq.inputs import Shape, parse_shape
from mpq.policy import OUTPUT_KINDS, OutputKind


def _shape(ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]) -> Shape | None:
    return parse_shape(texts)


# input_shape: Shape | None
input_shape = click.option(
    "--input-shape",
    "--input-size",
    "input_shape",
    metavar="C,H,W",
    multiple=True,
    callback=_shape,
    help="Of an image, or H,W, or one side; of other inputs NAME=SIZES:DTYPE, repeated.  "
    "[default: what the network is meant for, else 3,32,32]",
)


def _outputs(
    ctx: click.Context, param: click.Parameter, texts: tuple[str, ...]
) -> dict[str, OutputKind]:
    found: dict[str, OutputKind] = {}
    for text in texts:
        name, _, kind = (part.strip() for part in text.rpartition("="))
        known = next((k for k in OUTPUT_KINDS if k == kind), None)
        if not name or known is None or name in found:
            raise click.BadParameter(
                f"must be NAME=KIND, each name once, with one of {', '.join(OUTPUT_KINDS)}. "
                f"Got {text!r}{nearest(kind, OUTPUT_KINDS)}", ctx, param
            )  # fmt: skip
        found[name] = known
    return found


# outputs: dict[str, OutputKind]
outputs = click.option(
    "--output",
    "outputs",
    metavar="NAME=KIND",
    multiple=True,
    callback=_outputs,
    help=f"What an output is judged as: {', '.join(OUTPUT_KINDS)}.  [default: what it looks like]",
)
