"""`mpq rank`: which networks take low precision well."""

from __future__ import annotations

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
from mpq.zoo.detection import NAME_IT

OF_ITSELF = "Name a file of mpq train, which says what it is, or package.module:factory to train."


@click.command("rank")
@click.argument("candidates", nargs=-1, required=True, metavar="ARCH...|CHECKPOINT...",
                callback=options.named)  # fmt: skip
@bundles.source
@options.normalize
@options.limit("--effective-bits", "Mean bits per weight of the mixed policy.  [default: 4.8]")
@options.choice("--effort", EFFORTS, default="good", help="As in mpq ptq.")
@training.recipe("plain")
@options.count("--epochs", metavar="N", default=10, help="Epochs of an architecture's training.")
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
    effective_bits: float | None,
    effort: Effort,
    recipe: str,
    epochs: int,
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

    A candidate is a checkpoint, or an architecture, which is trained for --epochs first, and
    quantized without training. An interrupted run goes on with --resume.

    \b
    mpq rank resnet20 mobilenet_v2_cifar --data cifar10 --epochs 20
    mpq rank a.pth b.pth --data cifar10 --effective-bits 4.5
    """
    folder = places.hold(rundir.resolve_out(out, "rank"))
    if not resume:
        if (folder / FILE).exists() and not force:
            raise UsageError(
                f"{folder} holds a ranking. Go on with --resume, start anew with --force, or write "
                "elsewhere with -o."
            )
        rundir.refuse_overwrite(folder / FILE, force)
    how = Ranking(
        effective_bits=effective_bits or Ranking.effective_bits,
        effort=effort,
        samples=num_calib or Ranking.samples,
        images=num_test or Ranking.images,
        recipe=training.recipe_from(recipe, epochs, settings),
    )
    with training.live(epochs) as training_hooks, terminal.rephrased(NAME_IT, OF_ITSELF):
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
