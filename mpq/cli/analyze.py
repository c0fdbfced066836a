"""`mpq analyze`: sensitivity and policy of a checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click

from mpq import rundir
from mpq.analyze.perturb import Rounding
from mpq.analyze.score import METRICS, Scoring
from mpq.cli import bundles, ends, network, options, places, terminal, training
from mpq.data import DataSource, Normalization
from mpq.latency import LatencyProfile
from mpq.metrics.given import LossFunction
from mpq.pipeline.analysis import Analysis, write_analysis
from mpq.pipeline.analyzing import MINIMIZE, Analyzing, divided, find_policy
from mpq.pipeline.anything import Wanted
from mpq.pipeline.given import with_wishes
from mpq.pipeline.subject import Subject, open_checkpoint
from mpq.pipeline.wishes import Wishes
from mpq.policy import Constraints, OutputKind, Policy
from mpq.processes import leading
from mpq.rundir import Run

HELD_OUT = 500
"""Batches are read for so many images to validate on, where they have no part for that."""
_metrics = click.option(
    "--metric",
    multiple=True,
    metavar="NAME",
    callback=options.named,
    help=f"How layers are scored ({', '.join(METRICS)}), and what --max-drop and --validate judge "
    "by (top1, top5, miou, map, psnr, ssim, agreement, module:function); twice for both.  "
    "[default: fisher and top1]",
)


@click.command(cls=options.ListCommand)
@network.taken
@bundles.source
@options.normalize
@options.widths("--bits", "8,4", "Weight widths to choose from.")
@options.widths("--act-bits", "8", "Activation widths to choose from.")
@bundles.budgets
@options.choice("--minimize", MINIMIZE, default="bits",
                help="What --max-drop makes small, and what the Pareto front is over.")  # fmt: skip
@options.path("--profile", "profile_path",
              help="Latency profile.  [default: the run's, or the newest]")  # fmt: skip
@bundles.wishes_with(_metrics)
@training.loss
@options.choice("--rounding", get_args(Rounding), default="nearest",
                help="Of scored weights; feedback: as mpq ptq.")  # fmt: skip
@options.num_calib("512")
@ends.outputs
@options.path("--locked", metavar="POLICY", help="Keep the locked layers of this policy.")
@options.count("--validate", default=0, least=0,
               help="Measure so many random policies and compare with their scores.")  # fmt: skip
@click.option("--rescore", is_flag=True, help="Score anew, whatever scores there are already.")
@options.target("The kind of CPU to plan for.")
@options.seed
@training.device_for("Where to score.")
@options.as_json
@options.force
def analyze(
    of: network.Network,
    source: DataSource,
    normalize: Normalization | None,
    bits: tuple[int, ...],
    act_bits: tuple[int, ...],
    budgets: list[Constraints],
    minimize: str,
    profile_path: Path | None,
    wishes: Wishes,
    loss: LossFunction | None,
    rounding: Rounding,
    num_calib: int | None,
    outputs: dict[str, OutputKind],
    locked: Path | None,
    validate: int,
    rescore: bool,
    target: str | None,
    seed: int,
    device: str,
    as_json: bool,
    force: bool,
) -> None:
    """Find how many bits each layer of a network needs; write policy.yaml.

    The network is CHECKPOINT, or that of a run (or a file in it; without either of the newest run),
    with the run's data, normalization, outputs and budget where none are given, and its scores.

    \b
    mpq analyze model.pth
    mpq analyze runs/model --max-size-mb 0.1 --force     the same scores
    mpq analyze resnet20.pth --data cifar10 --effective-bits 4.8 -o runs/r20
    mpq analyze resnet20.pth --data cifar10 --bits 16,8,4 --max-size-mb 0.4
    mpq analyze model.pth --effective-bits 4.2,4.8,6     one policy each
    mpq analyze model.pth --max-drop 0.3         fewest bits for 0.3 points
    mpq analyze model.pth --data none            weights only, no images
    mpq analyze net.pth --model net:make --output boxes=regression
    mpq analyze net.pth --input-shape image=3,64,64 --input-shape ids=10:int64
    """
    metric, wishes = divided(wishes)
    scoring = Scoring(bits, act_bits, metric, seed, rounding=rounding, loss=loss)
    folder, before = of.folder, of.policy
    rundir.refuse_overwrite(folder / "policy.yaml", force)
    if before and not any(one.model_dump(exclude_none=True) for one in budgets):
        budgets = [before.constraints]
    timed = minimize == "latency" or budgets[0].max_latency_ms is not None or profile_path
    profile = _profile(profile_path, folder) if timed else None
    kept = Policy.load(locked) if locked else None
    how = Analyzing(
        scoring,
        num_calib or (before and before.data.samples) or Analyzing.samples,
        target,
        kept,
        profile,
        MINIMIZE[minimize],
        rescore,
        validate=validate,
    )
    if source.data is None:
        own = before.data.name if before else None
        source = replace(source, data="none" if wishes.batches is not None else own)
    if before and before.model and before.model.normalize and normalize is None:
        normalize = Normalization.parse(before.model.normalize)
    outputs = {**(before.outputs if before else {}), **outputs}
    subject = open_checkpoint(
        of.path, source, reading=of.reading, normalize=normalize, outputs=outputs
    )
    subject = with_wishes(subject, wishes, Wanted(how.samples, HELD_OUT, seed))
    _introduce(of.path, subject)
    with terminal.bars() as tell:
        found = find_policy(subject, budgets, how, Run(folder, seed, device, progress=tell))
    if leading():
        write_analysis(found, folder, force=force)
        _show(found, folder, as_json)


def _introduce(checkpoint: Path, subject: Subject) -> None:
    """Say what was opened."""
    takes = f"images {'x'.join(map(str, subject.info.input))}, {subject.info.classes} classes"
    if subject.call is not None:
        takes = ", ".join(f"{name} {spec}" for name, spec in subject.call.specs.items())
    terminal.say(
        f"{checkpoint}: {subject.info.arch}, {takes}, data "
        f"{subject.data_name}, normalization {subject.info.normalize or 'unknown'}"
    )


def _profile(path: Path | None, folder: Path) -> LatencyProfile:
    """The profile that was named, or the run's own, or the newest."""
    own = folder / "profile.json"
    if path is None and own.is_file():
        path = own
    return LatencyProfile.load(places.in_run(path, "profile.json"))


def _show(found: Analysis, folder: Path, as_json: bool) -> None:
    results = [(folder / c.file, c.policy.result) for c in found.choices]
    policies: list[dict[str, Any]] = []
    extra: dict[str, Any] = {}
    for path, result in results:
        assert result is not None
        policies.append({"file": str(path), **result.model_dump(mode="json", exclude_none=True)})
    if found.validation:
        truth = found.validation.to_json()
        extra = {key: truth[key] for key in ("rho", "judge", "rho_judge") if key in truth}
    terminal.result(as_json, {**policies[0], "policies": policies, **extra}, *found.shown())
    if as_json:
        return
    if found.policy.outputs:
        terminal.say(f"outputs: {', '.join(f'{n} {k}' for n, k in found.policy.outputs.items())}; "
                     "--output NAME=KIND sets another kind")  # fmt: skip
    if found.scores_from:
        terminal.say(f"scores from {found.scores_from}; --rescore scores anew")
    written = ", ".join(str(path) for path, _ in results)
    terminal.say(f"wrote {written}; next: mpq ptq, or mpq qat --teacher ens.pth")
