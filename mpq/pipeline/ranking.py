"""`rank`: how well networks take low precision, so that one can choose a student that does.

Each candidate is a checkpoint, or an architecture that is trained for a few epochs first. It is
quantized without training at 8 bits, at 4-bit weights, and at a mixed budget, and measured on the
validation split in simulation: top-1, and the divergence KL(float || quantized), which tells
candidates apart where the images are too few for top-1 to do so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mpq import files, rundir, zoo
from mpq.analyze import cost
from mpq.analyze.score import Scoring
from mpq.checkpoint import Reading
from mpq.data import DataSource, Normalization, sample_indices
from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.limits import read_text
from mpq.numerics import kl_divergence
from mpq.pipeline.analyzing import Analyzing, find_policy
from mpq.pipeline.quantizing import run_ptq
from mpq.pipeline.subject import Subject, open_checkpoint
from mpq.pipeline.training import new_subject, run_train, working_folder
from mpq.policy import Constraints, DataInfo, Policy
from mpq.ptq import Effort, PtqSettings
from mpq.report.plots import png
from mpq.report.ranking import rank_plot
from mpq.rundir import Run
from mpq.staging import together
from mpq.targets import get_target
from mpq.train import plan
from mpq.train.evaluate import predict, top1
from mpq.train.recipe import Recipe
from mpq.train.resume import CHECKPOINT

logger = logging.getLogger(__name__)
FORMS = {"8": (8, 8), "4": (4, 8)}
MIXED = "mixed"
FILE, PICTURE = "rank.json", "rank.png"


@dataclass(frozen=True)
class Ranking:
    """How candidates are compared.

    Args:
        effective_bits: mean weight bits of the mixed policy, from 8 and 4.
        effort: of the quantization.
        samples: training images to score and calibrate on.
        images: validation images to measure on.
        recipe: how candidates that are architectures are trained.
    """

    effective_bits: float = 4.8
    effort: Effort = "good"
    samples: int = 512
    images: int = 2000
    recipe: Recipe = field(default_factory=Recipe)

    def identity(self, data: str | None, seed: int) -> dict[str, Any]:
        """What must be equal for a finished row to be kept."""
        recipe = self.recipe.model_dump(mode="json")
        return {"data": data, **asdict(self), "recipe": recipe, "seed": seed}


@dataclass(frozen=True)
class Hooks:
    """What is called: `tell` with what is being done, `training` while a candidate trains."""

    tell: Callable[[str], None] = lambda _: None
    training: plan.Hooks = field(default_factory=plan.Hooks)


def rank(
    candidates: Sequence[str],
    source: DataSource,
    how: Ranking,
    run: Run,
    *,
    normalize: Normalization | None = None,
    hooks: Hooks | None = None,
) -> list[dict[str, Any]]:
    """Measure every candidate; write `rank.json`, `rank.png` and the checkpoints trained.

    Args:
        candidates: checkpoint files, or names of architectures.
        source: the data; `digits` for architectures unless it names others.
        how: budgets, images and training.
        run: its folder is written to; its seed is that of everything; on its device candidates are
            trained; to resume is to keep the rows of `rank.json` that were measured alike, and to
            go on with training.
        normalize: for checkpoints that do not carry it.
        hooks: what is called on the way.

    Returns:
        A row for each candidate, best first: `name, params, macs, float_bytes, top1` and `forms`,
        which maps `8`, `4` and `mixed` to `effective_bits, bytes, bitops, top1, drop, kl`; and
        `drop_per_bit`: points of top-1 that each effective bit below 8 costs at the mixed policy.

    Raises:
        UsageError: a candidate that is neither a file nor an architecture, or one named twice.
        CheckpointError, DataError, TrainError: as opening and training do.
    """
    _check(candidates, source, how)
    folder = run.folder or rundir.RUNS / "rank"
    identity = how.identity(source.data, run.seed)
    known = _known(folder / FILE, identity) if run.resume else {}
    bench = _Bench(source, how, replace(run, folder=folder), normalize, hooks or Hooks())
    # Files are opened first: what is wrong with one is told before others are trained.
    ready = {n: bench.open(n) for n in candidates if n not in known and Path(n).is_file()}
    _write(folder, identity, list(known.values()))  # the settings of what is trained from here on
    rows = []
    for place, name in enumerate(candidates):
        if name not in known:
            bench.hooks.tell(f"{name} ({place + 1} of {len(candidates)})")
            subject = ready.pop(name) if name in ready else bench.open(name)
            known[name] = bench.measure(name, subject)
            _write(folder, identity, [known[n] for n in candidates if n in known])
        rows.append(known[name])
    rows = sorted(rows, key=_order)
    _write(folder, identity, rows)
    return rows


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    """The most accurate mixed network first, the smaller of equals before the larger."""
    mixed = row["forms"][MIXED]
    return -mixed["top1"], mixed["bytes"]


def _check(candidates: Sequence[str], source: DataSource, how: Ranking) -> None:
    """Refuse what cannot be ranked, before anything is trained."""
    if source.data == "none":
        raise UsageError("--data must name images to measure on: ranking without any is no use.")
    narrow, wide = (FORMS[form][0] for form in ("4", "8"))
    if not narrow <= how.effective_bits <= wide:
        raise UsageError(
            f"--effective-bits must be in {narrow}..{wide}. Got {how.effective_bits:g}."
        )
    twice = sorted({name for name in candidates if list(candidates).count(name) > 1})
    if twice:
        raise UsageError(f"every candidate must be named once. Got {twice[0]} twice.")
    for name in candidates:
        if not Path(name).is_file():
            if Path(name).suffix in (*rundir.TORCH, ".bin"):
                raise UsageError(f"checkpoint {name} does not exist.")
            zoo.input_size(name)  # refuses an unknown name with the nearest ones


def _known(path: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run that were measured with the same settings."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(read_text(path, UsageError))
        saved, rows = content["settings"], {row["name"]: row for row in content["rows"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(f"{path} must be a file that `mpq rank` wrote, but is none.") from None
    changed = [k for k in identity if saved.get(k) != json.loads(json.dumps(identity[k]))]
    if changed:
        listed = ", ".join(changed)
        raise UsageError(
            f"{path} was measured with other settings ({listed}). Use the old ones, another folder "
            "with -o, or start anew with --force."
        )
    return rows


@dataclass(frozen=True)
class _Bench:
    """Where all candidates are opened and measured alike."""

    source: DataSource
    how: Ranking
    run: Run
    normalize: Normalization | None
    hooks: Hooks

    def open(self, name: str) -> Subject:
        """The trained network: from its file, or after a short training."""
        if Path(name).is_file():
            return open_checkpoint(Path(name), self.source, normalize=self.normalize)
        assert self.run.folder is not None
        written = self.run.folder / f"{name.replace(':', '-')}.pth"
        if not (self.run.resume and written.is_file()):
            self._train(name, written)
        reading = Reading(arch=name)
        return open_checkpoint(written, self.source, reading=reading, normalize=self.normalize)

    def _train(self, name: str, written: Path) -> None:
        seed = self.run.seed
        subject = new_subject(name, self.source, normalize=self.normalize, seed=seed)
        rundir.touch_run(written.parent)
        begun = (working_folder(written) / CHECKPOINT).is_file()
        run = replace(self.run, folder=None, resume=self.run.resume and begun)
        run_train(subject, plan.TrainingPlan(self.how.recipe), written, run, self.hooks.training)

    def measure(self, name: str, subject: Subject) -> dict[str, Any]:
        """The row of a candidate."""
        layers = list(subject.graph().layers.values())
        meter = _Meter(subject, self.how.images)
        exact, _ = meter.measure(subject.graph())
        forms = {}
        for form, policy in self._policies(subject).items():
            self.hooks.tell(f"{name} at {form} bits" if form != MIXED else f"{name}, {form}")
            forms[form] = self._form(policy, subject, meter, exact)
        saved = FORMS["8"][0] - forms[MIXED]["effective_bits"]
        lost = forms["8"]["top1"] - forms[MIXED]["top1"]
        return {
            "name": name,
            "arch": subject.info.arch,
            "data": subject.data_name,
            "params": sum(layer.params for layer in layers),
            "macs": sum(layer.macs for layer in layers),
            "float_bytes": 4 * sum(layer.params for layer in layers),
            "images": meter.count,
            "top1": round(exact, 3),
            "drop_per_bit": round(lost / saved, 3) if saved > 0 else None,
            "forms": forms,
        }

    def _form(
        self, policy: Policy, subject: Subject, meter: _Meter, exact: float
    ) -> dict[str, Any]:
        """What one policy makes of a network whose top-1 in float is `exact`."""
        settings = PtqSettings(effort=self.how.effort)
        found = run_ptq(policy, subject, settings, Run(seed=self.run.seed))
        layers, besides = list(found.graph.layers.values()), found.graph.besides
        choices = policy.resolve([layer.name for layer in layers])
        widths = {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()}
        reached, divergence = meter.measure(found.graph)
        return {
            "effective_bits": round(cost.effective_bits(layers, widths), 3),
            "bytes": cost.predicted_bytes(layers, widths, get_target(policy.target), besides),
            "bitops": cost.bitops(layers, widths, besides),
            "top1": round(reached, 3),
            "drop": round(exact - reached, 3),
            "kl": divergence,
        }

    def _policies(self, subject: Subject) -> dict[str, Policy]:
        """The policies to compare, uniform and found."""
        how, seed = self.how, self.run.seed
        data = DataInfo(name=subject.data_name, samples=how.samples, seed=seed)
        named = {"model": subject.info, "data": data}
        uniform = {form: Policy.uniform(*widths).replace(**named) for form, widths in FORMS.items()}
        budget = Constraints(effective_bits=how.effective_bits)
        scoring, run = (
            Analyzing(Scoring(seed=seed), samples=how.samples),
            Run(self.run.folder, seed),
        )
        return {**uniform, MIXED: find_policy(subject, budget, scoring, run).policy}


class _Meter:
    """Accuracy on a sample of the validation split, and the divergence from the float answers."""

    def __init__(self, subject: Subject, images: int) -> None:
        validation = subject.require_data("ranking").validation
        picked = sample_indices(validation, images, 0)
        self.images, self.labels = subject.read(validation, picked)
        self.subject, self.count = subject, len(picked)
        self.reference = predict(subject.module, self.images, subject.normalize).log_softmax(1)

    def measure(self, graph: QuantGraph) -> tuple[float, float]:
        """Percent right, and the divergence in nats per image."""
        logits = predict(graph.module, self.images, self.subject.normalize)
        apart = kl_divergence(self.reference, logits.log_softmax(1))
        return top1(logits, self.labels), max(0.0, float(apart.mean()))


def _write(folder: Path, identity: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """What is measured so far, and the picture of it."""
    with together(rundir.touch_run(folder)) as aside:
        files.write_json(aside / FILE, {"settings": dict(identity), "rows": list(rows)})
        if rows:
            files.write_bytes(aside / PICTURE, png(rank_plot(rows)))
