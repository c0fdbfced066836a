"""`demo`: the whole pipeline on the embedded digits, one row per configuration.

Two teachers, their ensemble, a student, a distilled student, analysis, PTQ, QAT at 16, 8, 16/8 and
8/4 bits with and without distillation, export, verification, bench. What it shows is that every
stage works and how they fit together; 359 test images of 16x16 prove nothing about accuracy.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mpq import origins, rundir
from mpq.analyze.score import Scoring
from mpq.data import DataSource, load_arrays
from mpq.export.bench import BenchRow, bench
from mpq.pipeline.analysis import write_analysis
from mpq.pipeline.analyzing import Analyzing, find_policy
from mpq.pipeline.exporting import export_float, export_run
from mpq.pipeline.quantizing import Quantized, run_ptq, run_qat, save_quantized
from mpq.pipeline.subject import Subject, open_checkpoint
from mpq.pipeline.training import build_ensemble, new_subject, run_train, write_ensemble
from mpq.policy import Constraints, Policy
from mpq.rundir import Run
from mpq.train.ensemble import Ensemble
from mpq.train.plan import TrainingPlan
from mpq.train.recipe import Recipe

TEACHERS = ("resnet32", "resnet20_conv")
STUDENT = "resnet20"
TRAIN = {"epochs": 6, "batch": 64, "lr": 0.1, "flip": False, "warmup_epochs": 1}
FINETUNE = {"epochs": 2, "batch": 64, "flip": False}
MIXED = 4.8
"""Effective bits of the 8/4 configuration; 16/8 gets the middle between both."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class DemoRow:
    """One configuration, judged on its file: accuracy, bytes and speed are onnxruntime's.

    Args:
        name: what it is.
        file: the ONNX file.
        top1: percent of the test images.
        bytes: on disk.
        ratio: times faster than the float file.
        agreement: share of test images with the class of the simulation; None for float.
        integer: share of the MACs that integer kernels execute; None for float.
        n: test images that `top1` was measured on.
    """

    name: str
    file: str
    top1: float
    bytes: int
    ratio: float
    agreement: float | None
    integer: float | None
    n: int


@dataclass(frozen=True)
class _Made:
    """A configuration on its way to a row."""

    name: str
    file: Path
    agreement: float | None = None
    integer: float | None = None


def run_demo(folder: Path, *, seed: int = 0, tell: Tell = lambda _: None) -> list[DemoRow]:
    """Run everything into `folder`; return the rows of the closing table.

    Args:
        folder: gets a run per configuration, `demo.json` and the analysis with its plots.
        seed: of all randomness.
        tell: called with what is being done.
    """
    teachers = _teachers(folder, seed, tell)
    plain = _student(folder, "student", None, seed, tell)
    distilled = _student(folder, "student-distilled", teachers, seed, tell)
    made = [_float("float", plain, folder), _float("float, distilled", distilled, folder)]
    policies = _policies(distilled, folder, seed, tell)
    for name in ("8", "8/4"):
        tell(f"PTQ at {name} bits")
        found = run_ptq(policies[name], distilled, run=Run(seed=seed))
        made.append(_export(f"PTQ {name}", found, folder))
    for name, policy in policies.items():
        for teacher in (None, teachers):
            label = f"QAT {name}" + (", distilled" if teacher else "")
            tell(f"{label} bits" if teacher is None else label)
            subject = plain if teacher is None else distilled
            plan = TrainingPlan(Recipe.load("qat").override(FINETUNE), teacher)
            found = run_qat(policy, subject, plan, Run(folder / _slug(label), seed))
            made.append(_export(label, found, folder))
    tell("measuring all files side by side")
    rows = _measure(made, distilled)
    text = json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"
    origins.keep(folder, "demo.json", text, "demo", ())
    return rows


def _slug(name: str) -> str:
    return name.lower().replace(", ", "-").replace(" ", "-").replace("/", "-")


def _teachers(folder: Path, seed: int, tell: Tell) -> Ensemble:
    paths = []
    for k, arch in enumerate(TEACHERS):
        tell(f"training teacher {k + 1} of {len(TEACHERS)}: {arch}")
        path = folder / f"teacher-{arch}.pth"
        subject = new_subject(arch, DataSource("digits"), normalize=None, seed=seed + k)
        plan = TrainingPlan(Recipe.load("plain").override(TRAIN))
        run_train(subject, plan, path, Run(seed=seed + k))
        paths.append(path)
    tell("bundling the ensemble")
    ensemble, _, data = build_ensemble(paths, DataSource("digits"))
    write_ensemble(ensemble, folder / "ens.pth", data, force=True)
    return ensemble


def _student(folder: Path, name: str, teacher: Ensemble | None, seed: int, tell: Tell) -> Subject:
    tell(f"training the {name}: {STUDENT}")
    path = folder / f"{name}.pth"
    subject = new_subject(STUDENT, DataSource("digits"), normalize=None, seed=seed)
    plan = TrainingPlan(Recipe.load("plain").override(TRAIN), teacher)
    run_train(subject, plan, path, Run(seed=seed))
    return open_checkpoint(path, DataSource("digits"))


def _policies(subject: Subject, folder: Path, seed: int, tell: Tell) -> dict[str, Policy]:
    """The policies by name: two found by analysis, two uniform."""
    tell("scoring layers and searching")
    run, how = Run(folder, seed), Analyzing(Scoring(seed=seed))
    mixed = find_policy(subject, Constraints(effective_bits=MIXED), how, run)
    write_analysis(mixed, folder, force=True)
    how = Analyzing(Scoring((16, 8), seed=seed))
    wide = find_policy(subject, Constraints(effective_bits=12.0), how, run)
    named = {"model": subject.info, "data": mixed.policy.data}
    return {
        "16": Policy.uniform(16).replace(**named),
        "8": Policy.uniform(8).replace(**named),
        "16/8": wide.policy,
        "8/4": mixed.policy,
    }


def _float(name: str, subject: Subject, folder: Path) -> _Made:
    path = folder / f"{_slug(name)}.onnx"
    return _Made(name, export_float(subject, path))


def _export(name: str, found: Quantized, folder: Path) -> _Made:
    run = folder / _slug(name)
    found = save_quantized(found, run / rundir.STAGES[found.metrics["stage"]])
    result = export_run(found, run, force=True)
    checked = result.verification
    return _Made(
        name,
        result.path,
        None if checked is None else checked.agreement,
        result.certificate.integer_macs_fraction,
    )


def _measure(made: list[_Made], subject: Subject) -> list[DemoRow]:
    images, labels = load_arrays(subject.require_data("demo").test)
    files = [m.file for m in made]
    measured: list[BenchRow] = bench(
        files, images=images, labels=labels, float_file=files[0], normalize=subject.normalize
    )
    found = {row.file: row for row in measured}
    rows = []
    for m in made:
        row = found[str(m.file)]
        rows.append(
            DemoRow(
                name=m.name,
                file=str(m.file),
                top1=row.top1 or 0.0,
                bytes=row.bytes,
                ratio=row.ratio_to_float or 0.0,
                agreement=m.agreement,
                integer=m.integer,
                n=row.n,
            )
        )
    return rows
