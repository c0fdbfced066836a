"""`mpq train`: a float baseline, a teacher, or a distilled student."""

from __future__ import annotations

from pathlib import Path

import click

from mpq import rundir
from mpq.cli import options, places, terminal, training
from mpq.data import DataSource, Normalization
from mpq.pipeline.guard import check_start
from mpq.pipeline.training import initial_weights, new_subject, run_train, working_folder
from mpq.processes import leading
from mpq.report.grid import counted
from mpq.report.words import NOWHERE, top1_text
from mpq.rundir import Run
from mpq.train.plan import TrainingPlan
from mpq.train.transforms import transform_of


@click.command()
@click.argument("arch", callback=options.named)
@training.source
@options.normalize
@training.teacher
@training.teacher_normalize
@training.teacher_model
@training.answers
@training.transform
@options.path("--init", help="Checkpoint to start from.")
@training.recipe("plain")
@training.epochs
@training.settings
@click.option("--show-recipe", is_flag=True, help="Print the recipe as YAML and stop.")
@options.seed
@training.compiling
@training.device
@options.as_json
@options.force
@options.resume
@click.option("--out", "-o", metavar="FILE", type=options.PATH, default=Path("model.pth"),
              show_default=True, help="Checkpoint to write.")  # fmt: skip
def train(
    arch: str,
    source: DataSource,
    normalize: Normalization | None,
    teacher: Path | None,
    teacher_normalize: str,
    teacher_model: str | None,
    answers: Path | None,
    transform: str | None,
    init: Path | None,
    recipe: str,
    epochs: int | None,
    settings: tuple[str, ...],
    show_recipe: bool,
    seed: int,
    compiling: bool,
    device: str,
    as_json: bool,
    force: bool,
    resume: bool,
    out: Path,
) -> None:
    """Train ARCH in float; with --teacher, distil into it.

    An interrupted run goes on with --resume. Its state and metrics.jsonl lie beside the output,
    for model.pth in model.train/.

    \b
    mpq train resnet20 --data cifar10 -o model.pth
    mpq train resnet20 --data cifar10 --teacher ens.pth -o student.pth
    """
    chosen = training.recipe_from(recipe, epochs, settings, compiling=compiling)
    if show_recipe:
        click.echo(chosen.to_yaml(), nl=False)
        return
    training.check_plan(chosen, device=device, teacher=teacher, unlabelled=source.unlabelled)
    rundir.require_kind(out, *rundir.TORCH)
    places.hold_file(out)
    places.hold(working_folder(out))
    resume = check_start(working_folder(out), out, resume=resume, force=force)
    subject = new_subject(arch, source, normalize=normalize, seed=seed)
    terminal.say(
        f"{arch} on {subject.data_name}: {subject.info.classes} classes, "
        f"normalization {subject.info.normalize}, {counted(chosen.epochs, 'epoch')}"
    )
    if init is not None:
        initial_weights(subject, init)
    random = transform_of(transform, subject.info.input[1:])
    guide = training.load_teacher(teacher, teacher_normalize, teacher_model)
    plan = TrainingPlan(chosen, guide, answers=answers, transform=random)
    run = Run(seed=seed, device=device, resume=resume)
    with training.live(chosen.epochs) as hooks:
        result = run_train(subject, plan, out, run, hooks)
    if not leading():
        return
    count = len(subject.require_data("training").validation)
    told = NOWHERE
    if result.top1 is not None:
        told = f"top-1 {top1_text(result.top1, count)} on {counted(count, 'held-out image')}"
    content = {"validation_top1": result.top1, "validation_images": count}
    terminal.result(as_json, {"file": str(out), **content}, told)
    if init is not None and not as_json:
        training.gain(result.start, result.top1, count, chosen, start=str(init))
    terminal.say(f"wrote {out}; next: mpq analyze {out}")
