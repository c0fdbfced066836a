"""`ptq` and `qat`: from a policy to `ptq.pth` or `qat.pth`, and back from that file to a graph."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mpq import files, origins, rundir
from mpq.calls import count
from mpq.data import DataSource
from mpq.errors import CheckpointError, UsageError
from mpq.graph.annotate import make_dynamic
from mpq.graph.ir import QuantGraph
from mpq.graph.norms import absorb_norms, attach_norms
from mpq.graph.outputs import stated
from mpq.graph.passes import freeze, prepare
from mpq.metrics.given import LossFunction
from mpq.outputs import settle as settle_outputs
from mpq.pipeline.accuracies import after_training
from mpq.pipeline.evaluating import validate
from mpq.pipeline.subject import Subject, policy_subject, settle
from mpq.pipeline.teaching import lessons
from mpq.policy import Policy
from mpq.ptq import FinishedBlocks, PtqSettings, equalize, looked_at, quantize_graph
from mpq.ptq.blockwise import PROGRESS
from mpq.report.words import measured
from mpq.rundir import Run
from mpq.saved import Kind
from mpq.shown import Shown
from mpq.staging import together
from mpq.train.loop import fit
from mpq.train.metrics import METRICS
from mpq.train.plan import Hooks, TrainingPlan
from mpq.train.progressive import stage, take_widths
from mpq.wide import take_form

logger = logging.getLogger(__name__)
KIND = Kind(
    "mpq/quantized",
    1,
    "be a quantized network, as `mpq ptq` and `mpq qat` write it. For a float checkpoint run "
    "`mpq analyze` and one of these first.",
)


@dataclass(frozen=True, repr=False)
class Quantized(Shown):
    """A quantized network: the prepared graph with its policy, and what was measured on the way.

    `made_from` says the same of the file that it was read from or written to (`mpq.origins.chain`).
    """

    graph: QuantGraph
    subject: Subject
    metrics: dict[str, Any]
    made_from: Mapping[str, str] = field(default_factory=dict)

    @property
    def policy(self) -> Policy:
        """What was asked, as the graph has it."""
        assert self.graph.policy is not None
        return self.graph.policy

    @property
    def module(self) -> nn.Module:
        """The network itself, to be called or trained on."""
        return self.graph.module

    def judged_as(self, kinds: Mapping[str, str]) -> Quantized:
        """The same, some of its outputs being of other kinds; raises as `mpq.outputs.settle`."""
        if not kinds:
            return self
        graph = self.graph.copy()
        graph.outputs = settle_outputs(graph.outputs, kinds)
        graph.policy = self.policy.replace(outputs=stated(graph.outputs))
        return replace(self, graph=graph)

    def to_json(self) -> dict[str, Any]:
        """What was measured on the way."""
        return self.metrics

    def shown(self) -> list[str]:
        """The network and what was measured, in two lines."""
        choices = self.policy.choices(list(self.graph.layers)).values()
        widths = Counter(f"W{c.weight_bits or 32}A{c.activation_bits or 32}" for c in choices)
        layers = ", ".join(f"{n} layers {name}" for name, n in widths.most_common())
        return [f"{self.subject.info.arch}, {self.metrics['stage']}: {layers}", *self.measured]

    @property
    def measured(self) -> list[str]:
        """Its accuracy beside float's, in lines."""
        return measured(self.metrics)

    def save(self, path: str | Path) -> Path:
        """Write policy, state and metrics, as `ptq.pth` of a run has them.

        Raises:
            CheckpointError: the path cannot be written.
        """
        KIND.save(Path(path), _content(self))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> Quantized:
        """Read what `save`, `mpq ptq` or `mpq qat` wrote.

        Args:
            path: the file.
            model: the network that was quantized; its weights do not matter. None: one of the zoo
                or of torchvision, as the policy names it.

        Raises:
            CheckpointError: the file is missing, damaged or of another network.
        """
        return load_quantized(Path(path), DataSource("none"), model)


def run_ptq(
    policy: Policy, subject: Subject, settings: PtqSettings | None = None, run: Run | None = None
) -> Quantized:
    """Quantize without training and measure on the validation split.

    Args:
        policy: widths per layer.
        subject: the network and its data.
        settings: how.
        run: its seed is that of the calibration images and of learning; in its folder effort `best`
            keeps its finished blocks (`rounding.pth`), from which it resumes.

    Raises:
        PolicyError: the policy does not fit the network.
        DataError: there are no calibration images.
        UsageError: finished blocks of another run.
    """
    settings, run = settings or PtqSettings(), run or Run()
    images = looked_at(subject.sample(policy.data.samples or 512, run.seed, "ptq"), settings.effort)
    floats = subject.graph()
    policy = make_dynamic(floats, policy) if settings.dynamic else policy
    policy = take_form(policy, settings.int16_form) if settings.int16_form else policy
    pairs = equalize(floats, images, policy, mode=settings.equalization)
    graph = prepare(floats, settle(policy, subject))
    metrics: dict[str, Any] = {
        "stage": "ptq",
        "calibration": settings.method,
        "effort": settings.effort,
        "images": count(images),
        "seed": run.seed,
        "equalized": sum(not pair.reason for pair in pairs),
        "dynamic": sum(c.dynamic for c in policy.resolve(list(floats.layers)).values()),
    }
    blocks = None
    if run.folder is not None:
        identity = metrics | {"policy": policy.to_yaml(), "weights": subject.info.sha256}
        blocks = FinishedBlocks(run.folder / PROGRESS, identity, resume=run.resume)
    quantize_graph(
        graph,
        images,
        method=settings.method,
        effort=settings.effort,
        learning=replace(settings.learning, seed=run.seed),
        finished=blocks,
        memory_mb=settings.memory_mb,
        progress=run.progress,
    )
    return Quantized(graph, subject, metrics | validate(graph, subject))


def run_qat(
    policy: Policy,
    subject: Subject,
    plan: TrainingPlan,
    run: Run,
    hooks: Hooks | None = None,
    *,
    loss: LossFunction | None = None,
) -> Quantized:
    """Quantize with training, starting from calibrated ranges.

    Args:
        policy: widths per layer.
        subject: the network and its data.
        plan: recipe and teachers.
        run: as `mpq.fit` takes it; its seed is that of the calibration images too.
        hooks: called while the training runs.
        loss: of the user's own, a function of outputs and batch (`mpq.pipeline.teaching`).

    Raises:
        PolicyError, DataError: as `run_ptq`.
        CheckpointError: teachers of other classes.
        ExportError: the network can have no file that runs, trained or not.
        TrainError: a loss that is not finite, or a checkpoint of another run.
    """
    from mpq.export import runtime  # a second of import that others save
    from mpq.export.lower import lower
    from mpq.export.onnx_file import serialize

    recipe = plan.recipe
    images = subject.sample(policy.data.samples or 512, run.seed, "qat")
    graph = prepare(subject.graph(), settle(policy, subject))
    plan, data = lessons(graph, subject, plan, loss)
    if recipe.progressive_epochs:
        take_widths(graph.module, stage(graph.module, 0, recipe.progressive_epochs))
    quantize_graph(graph, images, progress=run.progress)
    runtime.session(serialize(lower(freeze(graph.copy()))))  # is there a file, and one that runs?
    if recipe.norm == "live":
        attach_norms(graph, images)
    result = fit(graph.module, data, plan, run, hooks)
    graph.module.cpu()
    absorb_norms(graph)
    metrics = {
        "stage": "qat",
        "epochs": recipe.epochs,
        "seed": run.seed,
        "calibrated_top1": None if recipe.progressive_epochs else result.start,  # at other widths
        **after_training(result.top1, graph, subject),
        "teachers": [] if plan.teacher is None else list(plan.teacher.names),
    }
    if plan.task is not None:
        metrics["teachers"] = [plan.task.name] if plan.task.teacher is not None else []
        metrics["loss"] = getattr(plan.task.loss, "__name__", None)
    if plan.judge is not None:
        metrics |= {"metric": plan.judge.name, "value": result.value, "calibrated": result.before}
    return Quantized(graph, subject, metrics)


def check_policy_file(policy_path: Path, folder: Path, *, force: bool) -> None:
    """Refuse to mix two policies in one run.

    Raises:
        UsageError: the folder has another `policy.yaml` and `force` is off.
    """
    kept = folder / "policy.yaml"
    if kept.is_file() and not force and kept.read_bytes() != policy_path.read_bytes():
        raise UsageError(
            f"{kept} is another policy than {policy_path}. Replace it with --force, or write "
            "elsewhere with -o."
        )


def begin_policy(policy_path: Path, folder: Path) -> None:
    """Put the policy into a run that has none yet, so that its work can be resumed without it.

    Another one, that `--force` replaces, goes when the work is done (`save_quantized`).
    """
    if not (rundir.touch_run(folder) / "policy.yaml").is_file():
        files.write_bytes(folder / "policy.yaml", policy_path.read_bytes())


def save_quantized(
    found: Quantized, path: Path, policy_path: Path | None = None, asked: Policy | None = None
) -> Quantized:
    """Write `ptq.pth` or `qat.pth`: policy, state and metrics, readable with `weights_only`.

    With it, as one step, `policy.yaml` as the user wrote it, where one is given.

    Args:
        found: what to write.
        path: where to.
        policy_path: the file of the policy.
        asked: the policy as that file had it when the work began.

    Returns:
        `found`, with what it was made from.

    Raises:
        CheckpointError: the path cannot be written.
    """
    made_from = {origins.WEIGHTS: found.subject.info.sha256, **_data_of(found)}
    if asked is not None:
        made_from[origins.POLICY] = origins.digest(asked)
    noted, by, folder = {path.name: made_from}, found.metrics["stage"], path.parent
    with together(rundir.touch_run(folder)) as aside:
        KIND.save(aside / path.name, _content(found))
        if policy_path is not None and policy_path.resolve() != (folder / "policy.yaml").resolve():
            _place_policy(policy_path, asked, aside / "policy.yaml")
        if by == "qat" and (folder / METRICS).is_file():
            noted[METRICS] = made_from
        origins.note(aside, folder, by, noted)
    return replace(found, made_from=origins.chain(path))


def _content(found: Quantized) -> dict[str, Any]:
    """What its file holds."""
    return {
        "policy": found.policy.to_yaml(),
        "state": found.graph.module.state_dict(),
        "metrics": found.metrics,
    }


def _place_policy(source: Path, asked: Policy | None, place: Path) -> None:
    """Comments and all; where it was edited meanwhile, as it was when the work began."""
    if asked is None or (source.is_file() and origins.identity(source) == origins.digest(asked)):
        files.write_bytes(place, source.read_bytes())
    else:
        files.write_text(place, asked.to_yaml())


def _data_of(found: Quantized) -> dict[str, str]:
    data = found.policy.data
    return {"data": f"{data.name}, {data.samples} images, seed {data.seed}"}


def load_quantized(
    path: Path, source: DataSource, model: nn.Module | None = None, *, trust_pickle: bool = False
) -> Quantized:
    """Read a quantized network back into a prepared graph; of `model`, where no policy names one.

    Of a network that is no name's, the checkpoint is read again, with `trust_pickle` a pickle too.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind.
    """
    made_from = origins.chain(path) if path.is_file() else {}
    if made_from and path.name == rundir.FORMER and rundir.is_run(path.parent):
        logger.warning("%s is as mpq 0.1 named what ptq and qat wrote; it is read until 0.3", path)
    content = KIND.read(path)
    _check_content(content, path)
    policy = Policy.from_yaml(content["policy"], f"the policy in {path}")
    subject = policy_subject(
        policy, path, source, weights=False, trust_pickle=trust_pickle, module=model
    )
    graph = prepare(subject.graph(), policy)
    try:
        graph.module.load_state_dict(content["state"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit {subject.info.arch}: {' '.join(str(error).split())[:300]}"
        ) from None
    graph.module.eval()
    return Quantized(graph, subject, content["metrics"], made_from)


def _check_content(content: dict[str, Any], path: Path) -> None:
    for key, kind in (("policy", str), ("state", dict), ("metrics", dict)):
        if not isinstance(content.get(key), kind):
            raise CheckpointError(
                f"{path}: {key} must be a {kind.__name__}. Got {type(content.get(key)).__name__} "
                "instead; write the file again with `mpq ptq` or `mpq qat`."
            )
    for name, value in content["state"].items():
        if not isinstance(value, Tensor) or not bool(value.isfinite().all()):
            raise CheckpointError(f"{path}: {name} must be a tensor of finite numbers.")
