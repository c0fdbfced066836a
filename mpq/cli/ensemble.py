"""`mpq ensemble`: bundle teachers into one file."""

from __future__ import annotations

from pathlib import Path

import click

from mpq import rundir
from mpq.checkpoint import Reading
from mpq.cli import bundles, options, places, terminal
from mpq.data import DataSource, Normalization
from mpq.pipeline.training import build_ensemble, write_ensemble
from mpq.report.grid import counted
from mpq.report.trained import ensemble_table


@click.command()
@click.argument("checkpoints", nargs=-1, required=True, type=options.PATH)
@bundles.source
@options.normalize
@options.model
@options.weights
@options.trust_pickle
@options.as_json
@options.force
@click.option("--out", "-o", metavar="FILE", type=options.PATH, default=Path("ens.pth"),
              show_default=True, help="File to write.")  # fmt: skip
def ensemble(
    checkpoints: tuple[Path, ...],
    source: DataSource,
    normalize: Normalization | None,
    model: str | None,
    weights: str | None,
    trust_pickle: bool,
    as_json: bool,
    force: bool,
    out: Path,
) -> None:
    """Bundle CHECKPOINTS as teachers, measured one by one and together.

    One of them may be an ensemble: its members join, each with its own normalization.

    \b
    mpq ensemble a.pth b.pth c.pth -o ens.pth
    mpq ensemble d.pth --normalize cifar10 ens.pth -o all.pth
    """
    rundir.require_kind(out, *rundir.TORCH)
    rundir.refuse_overwrite(places.hold_file(out), force)
    how = Reading(model, weights=weights, trust_pickle=trust_pickle)
    with terminal.status() as tell:
        tell("measuring the teachers")
        found, dataset, name = build_ensemble(checkpoints, source, normalize=normalize, how=how)
    write_ensemble(found, out, name, force=force)
    rows = [
        {"name": m.name, "arch": m.arch, "normalize": str(m.normalize), "top1": m.top1}
        for m in found.members
    ]
    rows.append({"name": "together (mean)", "arch": "", "normalize": "", "top1": found.top1})
    members = [{"name": m.name, "arch": m.arch, "validation_top1": m.top1} for m in found.members]
    content = {"file": str(out), "validation_top1": found.top1, "members": members}
    terminal.result(as_json, content, ensemble_table(rows, len(dataset.validation)))
    terminal.say(f"measured on {counted(len(dataset.validation), 'validation image')} of {name}")
    terminal.say(f"wrote {out}; next: mpq qat --teacher {out}")
