"""`mpq rank`: which networks take low precision well."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mpq import rundir
from mpq.cli import bundles, options, places, terminal, training
from mpq.data import DataSource, Normalization
from mpq.errors import UsageError
from mpq.pipeline.ranking import FILE, PICTURE, Hooks, Ranking, rank
from mpq.ptq import EFFORTS, Effort
from mpq.report.ranking import rank_table
from mpq.rundir import Run

EPOCHS = 10


@click.command("rank")
@click.argument("candidates", nargs=-1, required=True, metavar="ARCH...|CHECKPOINT...",
                callback=options.named)  # fmt: skip
@bundles.source
@options.normalize
@options.effective_bits
@options.choice("--effort", EFFORTS, default="good", help="As in mpq ptq.")
@training.recipe("plain")
@training.epochs
@training.settings
@options.num_calib("512")
@options.num_test("2000")
@options.seed
@training.device
@options.as_json
@options.force
@options.resume
@options.out("Run folder to write to.  [default: runs/rank]")
def command(
    candidates: tuple[str, ...],
    source: DataSource,
    normalize: Normalization | None,
    effective_bits: tuple[float, ...],
    effort: Effort,
    recipe: str,
    epochs: int | None,
    settings: tuple[str, ...],
    num_calib: int | None,
    num_test: int | None,
    seed: int,
    device: str,
    as_json: bool,
    force: bool,
    resume: bool,
    out: Path | None,
) -> None:
    """Compare networks by what 8, 4 and mixed bits cost them; write rank.json and rank.png.

    A candidate is a checkpoint, or an architecture, which is trained for --epochs (10) first, and
    quantized without training. An interrupted run goes on with --resume.

    \b
    mpq rank resnet20 mobilenet_v2_cifar --data cifar10 --epochs 20
    mpq rank a.pth b.pth --data cifar10 --effective-bits 4.5
    """
    folder = places.hold(rundir.resolve_out(out, "rank"))
    if not resume:
        rundir.refuse_overwrite(folder / FILE, force)
    how = Ranking(
        effective_bits=_single(effective_bits),
        effort=effort,
        samples=num_calib or Ranking.samples,
        images=num_test or Ranking.images,
        recipe=training.recipe_from(recipe, epochs or EPOCHS, settings),
    )
    with training.live(epochs or EPOCHS) as training_hooks:
        rows = rank(
            candidates,
            source,
            how,
            Run(folder, seed, device, resume),
            normalize=normalize,
            hooks=Hooks(terminal.say, training_hooks),
        )
    terminal.result(as_json, {"rows": rows}, rank_table(rows))
    terminal.say(f"wrote {folder / FILE} and {folder / PICTURE}")


def _single(bits: Sequence[float]) -> float:
    """The one budget of the mixed policy."""
    if len(bits) > 1:
        raise UsageError(f"rank compares at one budget. Got --effective-bits {bits}.")
    return bits[0] if bits else Ranking.effective_bits
