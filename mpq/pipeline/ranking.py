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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq import files, rundir, zoo
from mpq.analyze import cost
from mpq.analyze.score import Scoring
from mpq.data import Normalization, sample_indices
from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.numerics import kl_divergence
from mpq.pipeline.analyzing import Analyzing, find_policy
from mpq.pipeline.quantizing import run_ptq
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.pipeline.training import new_subject, run_train, working_folder
from mpq.policy import Constraints, DataInfo, Policy
from mpq.ptq import Effort, PtqSettings
from mpq.report.plots import png
from mpq.report.ranking import rank_plot
from mpq.rundir import Run
from mpq.target import get_target
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
        seed: of everything.
    """

    effective_bits: float = 4.8
    effort: Effort = "good"
    samples: int = 512
    images: int = 2000
    recipe: Recipe = field(default_factory=Recipe)
    seed: int = 0

    def identity(self, data: str | None) -> dict[str, Any]:
        """What must be equal for a finished row to be kept."""
        return {"data": data, **asdict(self), "recipe": self.recipe.model_dump(mode="json")}


@dataclass(frozen=True)
class Hooks:
    """What is called: `tell` with what is being done, `training` while a candidate trains."""

    tell: Callable[[str], None] = lambda _: None
    training: plan.Hooks = field(default_factory=plan.Hooks)


def rank(
    candidates: Sequence[str],
    source: DataSource,
    folder: Path,
    how: Ranking,
    *,
    normalize: Normalization | None = None,
    resume: bool = False,
    device: str = "cpu",
    hooks: Hooks | None = None,
) -> list[dict[str, Any]]:
    """Measure every candidate; write `rank.json`, `rank.png` and the checkpoints trained.

    Args:
        candidates: checkpoint files, or names of architectures.
        source: the data; `digits` for architectures unless it names others.
        folder: the run.
        how: budgets, images and training.
        normalize: for checkpoints that do not carry it.
        resume: keep the rows of `rank.json` that were measured alike, and go on with training.
        device: where to train.
        hooks: who is told what.

    Returns:
        A row for each candidate, best first: `name, params, macs, float_bytes, top1` and `forms`,
        which maps `8`, `4` and `mixed` to `effective_bits, bytes, bitops, top1, drop, kl`; and
        `drop_per_bit`: points of top-1 that each effective bit below 8 costs at the mixed policy.

    Raises:
        UsageError: a candidate that is neither a file nor an architecture, or one named twice.
        CheckpointError, DataError, TrainError: as opening and training do.
    """
    hooks = hooks or Hooks()
    _check(candidates, source)
    identity = how.identity(source.data)
    known = _known(folder / FILE, identity) if resume else {}
    rows = []
    for place, name in enumerate(candidates):
        if name not in known:
            hooks.tell(f"{name} ({place + 1} of {len(candidates)})")
            subject = _open(name, source, folder, how, normalize, resume, device, hooks)
            known[name] = _measure(name, subject, how, hooks)
            _write(folder, identity, [known[n] for n in candidates if n in known])
        rows.append(known[name])
    rows = sorted(rows, key=_order)
    _write(folder, identity, rows)
    files.write_bytes(folder / PICTURE, png(rank_plot(rows)))
    return rows


def _order(row: Mapping[str, Any]) -> tuple[float, float]:
    """The most accurate mixed network first, the smaller of equals before the larger."""
    mixed = row["forms"][MIXED]
    return -mixed["top1"], mixed["bytes"]


def _check(candidates: Sequence[str], source: DataSource) -> None:
    """Refuse what cannot be ranked, before anything is trained."""
    if source.data == "none":
        raise UsageError("--data must name images to measure on: ranking without any is no use.")
    twice = sorted({name for name in candidates if list(candidates).count(name) > 1})
    if twice:
        raise UsageError(f"every candidate must be named once. Got {twice[0]} twice.")
    for name in candidates:
        if not Path(name).is_file():
            if Path(name).suffix in (".pth", ".pt", ".ckpt", ".bin"):
                raise UsageError(f"checkpoint {name} does not exist.")
            zoo.input_size(name)  # refuses an unknown name with the nearest ones


def _known(path: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run that were measured with the same settings."""
    if not path.is_file():
        raise UsageError(f"--resume must find {path}, but it does not exist. Run without --resume.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        saved, rows = content["settings"], {row["name"]: row for row in content["rows"]}
    except (ValueError, KeyError, TypeError):
        raise UsageError(f"{path} must be a file that `mpq rank` wrote, but is none.") from None
    changed = [k for k in identity if saved.get(k) != json.loads(json.dumps(identity[k]))]
    if changed:
        listed = ", ".join(changed)
        raise UsageError(
            f"{path} was measured with other settings ({listed}). Use the old ones, another folder "
            "with -o, or start anew with --force."
        )
    return rows


def _open(
    name: str,
    source: DataSource,
    folder: Path,
    how: Ranking,
    normalize: Normalization | None,
    resume: bool,
    device: str,
    hooks: Hooks,
) -> Subject:
    """The trained network: from its file, or after a short training."""
    if Path(name).is_file():
        return open_checkpoint(Path(name), source, normalize=normalize)
    written = folder / f"{name.replace(':', '-')}.pth"
    if not (resume and written.is_file()):
        subject = new_subject(name, source, normalize=normalize, seed=how.seed)
        rundir.touch_run(folder)
        begun = (working_folder(written) / CHECKPOINT).is_file()
        run = Run(seed=how.seed, device=device, resume=resume and begun)
        run_train(subject, plan.TrainingPlan(how.recipe), written, run, hooks.training)
    return open_checkpoint(written, source, arch=name, normalize=normalize)


def _measure(name: str, subject: Subject, how: Ranking, hooks: Hooks) -> dict[str, Any]:
    graph = subject.graph()
    layers = list(graph.layers.values())
    meter = _Meter(subject, how.images)
    exact = meter.top1(graph)
    forms = {}
    for form, policy in _policies(subject, how).items():
        hooks.tell(f"{name} at {form} bits" if form != MIXED else f"{name}, {form}")
        settings = PtqSettings(effort=how.effort)
        found = run_ptq(policy, subject, settings, Run(seed=how.seed))
        choices = policy.resolve([layer.name for layer in layers])
        widths = {n: (c.weight_bits, c.activation_bits) for n, c in choices.items()}
        reached = meter.top1(found.graph)
        forms[form] = {
            "effective_bits": round(cost.effective_bits(layers, widths), 3),
            "bytes": cost.predicted_bytes(layers, widths, get_target(policy.target)),
            "bitops": cost.bitops(layers, widths),
            "top1": round(reached, 3),
            "drop": round(exact - reached, 3),
            "kl": meter.divergence,
        }
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


def _policies(subject: Subject, how: Ranking) -> dict[str, Policy]:
    """The policies to compare, uniform and found."""
    data = DataInfo(name=subject.data_name, samples=how.samples, seed=how.seed)
    named = {"model": subject.info, "data": data}
    uniform = {form: Policy.uniform(*widths).replace(**named) for form, widths in FORMS.items()}
    budget = Constraints(effective_bits=how.effective_bits)
    asked = Analyzing(Scoring(seed=how.seed), samples=how.samples)
    mixed = find_policy(subject, budget, asked, Run(seed=how.seed)).policy
    return {**uniform, MIXED: mixed}


class _Meter:
    """Accuracy on a sample of the validation split, and the divergence from the float answers."""

    def __init__(self, subject: Subject, images: int) -> None:
        validation = subject.require_data("ranking").validation
        picked = sample_indices(validation, images, 0)
        self.images, self.labels = subject.read(validation, picked)
        self.subject, self.count = subject, len(picked)
        self.reference = predict(subject.module, self.images, subject.normalize).log_softmax(1)
        self.divergence = 0.0

    def top1(self, graph: QuantGraph) -> float:
        """Percent right; `divergence` becomes that of this graph, in nats per image."""
        logits = predict(graph.module, self.images, self.subject.normalize)
        apart = kl_divergence(self.reference, logits.log_softmax(1))
        self.divergence = max(0.0, float(apart.mean()))
        return top1(logits, self.labels)


def _write(folder: Path, identity: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    rundir.touch_run(folder)
    files.write_json(folder / FILE, {"settings": dict(identity), "rows": list(rows)})
