"""`mpq qat`: quantize by a policy, with training and distillation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from mpq import rundir
from mpq.cli import bundles, ends, options, places, terminal, training
from mpq.data import DataSource
from mpq.metrics.given import LossFunction
from mpq.pipeline.anything import Wanted
from mpq.pipeline.given import with_wishes
from mpq.pipeline.guard import check_start
from mpq.pipeline.quantizing import begin_policy, check_policy_file, run_qat, save_quantized
from mpq.pipeline.subject import policy_subject
from mpq.pipeline.wishes import Wishes
from mpq.policy import OutputKind, Policy
from mpq.processes import leading
from mpq.rundir import Run
from mpq.train.plan import TrainingPlan
from mpq.train.transforms import transform_of
from mpq.wide import Int16Form, take_form


@click.command()
@bundles.policy
@training.teacher
@training.teacher_normalize
@training.teacher_model
@training.answers
@training.transform
@training.source
@bundles.wishes
@training.loss
@training.recipe("qat")
@training.epochs
@training.settings
@options.seed
@options.int16_form
@ends.outputs
@training.compiling
@training.device
@options.trust_pickle
@options.as_json
@options.force
@options.resume
@options.out("Run folder to write to.  [default: the policy's]")
def qat(
    policy_path: Path,
    teacher: Path | None,
    teacher_normalize: str,
    teacher_model: str | None,
    answers: Path | None,
    transform: str | None,
    source: DataSource,
    wishes: Wishes,
    loss: LossFunction | None,
    recipe: str,
    epochs: int | None,
    settings: tuple[str, ...],
    seed: int,
    int16_form: Int16Form | None,
    outputs: dict[str, OutputKind],
    compiling: bool,
    device: str,
    trust_pickle: bool,
    as_json: bool,
    force: bool,
    resume: bool,
    out: Path | None,
) -> None:
    """Quantize the network of a policy with training; write qat.pth and metrics.jsonl.

    An interrupted run goes on with --resume and ends as if it had not been interrupted.

    \b
    mpq qat p.yaml --teacher ens.pth
    mpq qat runs/r20 --epochs 10 --set lr=0.005
    mpq qat p.yaml --data pictures          the float network teaches
    mpq qat p.yaml --batches my.data:loaders --loss my.loss:focal --metric miou
    """
    path = policy_path
    policy = asked = Policy.load(path)
    folder = places.hold(places.run_of(path, out))
    written = folder / rundir.STAGES["qat"]
    resume = check_start(folder, written, resume=resume, force=force)
    check_policy_file(path, folder, force=force or resume)
    chosen = training.recipe_from(recipe, epochs, settings, compiling=compiling)
    training.check_plan(chosen, device=device, teacher=teacher, unlabelled=source.unlabelled)
    policy = policy.with_outputs(outputs)
    subject = policy_subject(policy, path, source, weights=True, trust_pickle=trust_pickle)
    subject = with_wishes(subject, wishes, Wanted(None, seed=seed))
    random = transform_of(transform, subject.info.input[1:])
    guide = training.load_teacher(teacher, teacher_normalize, teacher_model)
    plan = TrainingPlan(chosen, guide, answers=answers, transform=random)
    run = Run(folder, seed, device, resume)
    if int16_form is not None:
        policy = take_form(policy, int16_form)
    with training.live(chosen.epochs) as hooks:
        hooks = replace(hooks, on_start=lambda: begin_policy(path, folder))
        found = run_qat(policy, subject, plan, run, hooks, loss=loss)
    if not leading():
        return
    save_quantized(found, written, path, asked)
    (folder / "checkpoint.pth").unlink(missing_ok=True)  # the run is complete
    before, top1 = found.metrics["calibrated_top1"], found.metrics["validation_top1"]
    terminal.result(as_json, {"file": str(written), **found.metrics}, *found.measured)
    if not as_json:
        count = found.metrics.get("validation_images", 0)
        training.gain(before, top1, count, chosen, start="what mpq ptq gives")
    terminal.say(f"wrote {written}; next: mpq export")
    terminal.hint(folder)
