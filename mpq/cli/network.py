"""`[CHECKPOINT|RUN]`: the network that a command works on, named by its file or by a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click

from mpq import rundir
from mpq.checkpoint import Reading
from mpq.cli import ends, options, places
from mpq.cli.bundles import given
from mpq.inputs import Shape
from mpq.pipeline.loading import reading_of
from mpq.policy import Policy
from mpq.userimport import trust


@dataclass(frozen=True)
class Network:
    """The network that a command works on.

    Args:
        path: its file.
        reading: how that is read.
        folder: the run to write to, which is held.
        policy: what a run that was named says of its network.
    """

    path: Path
    reading: Reading
    folder: Path
    policy: Policy | None


def taken(command: Callable[..., None]) -> Callable[..., None]:
    """`[CHECKPOINT|RUN]` and how it is read, and `--out`: argument `of`, a `Network`."""

    @wraps(command)
    def folded(
        *,
        checkpoint: Path | None,
        model: str | None,
        weights: str | None,
        input_shape: Shape | None,
        trust_pickle: bool,
        out: Path | None,
        **others: Any,
    ) -> None:
        reading = Reading(model, None, weights, input_shape, trust_pickle)
        file = places.policy_of(checkpoint)
        if file is None:
            assert checkpoint is not None
            trust(str(checkpoint))  # it may be the name of code
            folder = places.hold(rundir.resolve_out(out, checkpoint.stem))
            command(of=Network(checkpoint, reading, folder, None), **others)
            return
        folder = places.hold(places.run_of(file, out))
        found = Policy.load(file)
        path, reading = reading_of(found, file, reading)
        command(of=Network(path, reading, folder, found), **others)

    argument = click.argument(
        "checkpoint", required=False, type=options.PATH, metavar="[CHECKPOINT|RUN]"
    )
    more = (options.model, options.weights, ends.input_shape, options.trust_pickle)
    return given(folded, argument, *more, options.out("Run folder to write to.  [default: RUN, "
                                                       "or runs/NAME]"))  # fmt: skip
