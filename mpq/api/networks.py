"""Verbs on networks: `analyze`, `ptq`, `qat`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mpq.analyze.perturb import Rounding
from mpq.analyze.score import Scoring
from mpq.calls import Inputs
from mpq.errors import PolicyError, UsageError
from mpq.latency import LatencyProfile
from mpq.metrics.given import LossFunction, loss_of
from mpq.pipeline.analysis import Analysis
from mpq.pipeline.analyzing import MINIMIZE, Analyzing, divided, find_policy
from mpq.pipeline.anything import Wanted
from mpq.pipeline.given import Data, as_batches, given, judged
from mpq.pipeline.quantizing import Quantized, run_ptq, run_qat
from mpq.pipeline.subject import GIVEN, Subject
from mpq.pipeline.wishes import Wishes
from mpq.policy import Constraints, OutputKind, Policy
from mpq.ptq import MEMORY_MB, Effort, Equalize, Learning, Method, PtqSettings
from mpq.rundir import Progress, Run, silent
from mpq.train.ensemble import Ensemble, Member, load_ensemble
from mpq.train.plan import Hooks, TrainingPlan
from mpq.train.recipe import Recipe
from mpq.train.transforms import Transform, transform_of
from mpq.wide import Int16Form, take_form

Model = nn.Module | str | Path
Budget = float | Constraints | Mapping[str, float]
"""Effective bits, or limits by their names, or the values of these."""
CALIBRATION, HELD_OUT, MEASURED = 512, 500, 2000


@dataclass(frozen=True)
class _Given:
    """What a verb works on, as it was given, and how its answers are judged."""

    model: Model
    data: Data | None
    validation: Data | None
    wishes: Wishes
    normalize: str
    outputs: Mapping[str, OutputKind] | None
    loss: LossFunction | None = None
    example: Inputs | None = None

    def subject(self, wanted: Wanted) -> Subject:
        """The network, with so many images, its metric and its batches."""
        found = given(
            self.model,
            self.data,
            wanted,
            validation=self.validation,
            normalize=self.normalize,
            example=self.example,
            outputs=self.outputs,
        )
        return judged(found, self.wishes, self.data, self.validation, learn=self.loss is not None)


def analyze(
    model: Model,
    data: Data | None = None,
    *,
    budget: Budget | Sequence[Budget] | None = None,
    validation: Data | None = None,
    normalize: str = "",
    example: Inputs | None = None,
    outputs: Mapping[str, OutputKind] | None = None,
    bits: Sequence[int] = (8, 4),
    act_bits: Sequence[int] = (8,),
    minimize: str = "bits",
    profile: LatencyProfile | str | Path | None = None,
    metric: Any = None,
    loss: LossFunction | str | None = None,
    postprocess: Callable[[Any], Any] | str | None = None,
    lower_is_better: bool = False,
    rounding: Rounding = "nearest",
    num_calib: int | None = None,
    locked: Policy | str | Path | None = None,
    validate: int = 0,
    target: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = silent,
) -> Analysis:
    """Find how many bits each layer needs, as `mpq analyze` does.

    Args:
        model: a trained network, or its checkpoint.
        data: images to score on; None: the weights alone are looked at.
        budget: effective bits, `{"max_size_mb": 0.4, "max_drop": 0.3}`, or `mpq.Constraints`; of
            several, each gets a policy. None: 4.8 effective bits, or near the narrowest of `bits`.
        validation: images to measure on, for `max_drop` and `validate`. None: further ones of
            `data`.
        normalize: what has been done to the images, as `--normalize`.
        example: a batch, where there are no data: `[N, C, H, W]`, or inputs (`mpq.calls`).
        outputs: kinds of outputs by name, as `--output` (`mpq.outputs`); of others it is proposed.
        bits: weight widths to choose from.
        act_bits: activation widths to choose from.
        minimize: what `max_drop` makes small, and what the front is over: `bits`, `size`, `bops`,
            `activation` or `latency`.
        profile: measured latencies, for `max_latency_ms`.
        metric: how layers are scored, or what `max_drop` and `validate` judge by (`top1`, `miou`,
            an object or a function: `mpq.metrics.given`), or a tuple of both. None: by `fisher`,
            and by top-1.
        loss: of outputs and a batch of `data`, whose increase the scores predict. None: the
            divergence from what the network answers.
        postprocess: what is applied to the outputs before they are judged.
        lower_is_better: of a metric that does not say so itself.
        rounding: of scored weights.
        num_calib: images to score on. None: 512.
        locked: a policy whose locked layers are kept.
        validate: random policies to measure the scores against.
        target: the kind of CPU to plan for; None: that of this computer.
        seed: of all randomness.
        device: where to score, `cpu` or `cuda`.
        progress: called with (phase, done, all).

    Raises:
        DataError, GraphError: data or a network that cannot be taken.
        InfeasibleError: no widths meet the budget.
    """
    if minimize not in MINIMIZE:
        raise UsageError(f"minimize must be one of {', '.join(MINIMIZE)}. Got {minimize!r}.")
    score, wishes = divided(Wishes(metric, lower_is_better, postprocess))
    own = None if loss is None else loss_of(loss)
    asked = _Given(model, data, validation, wishes, normalize, outputs, own, example)
    scoring = Scoring(tuple(bits), tuple(act_bits), score, seed, rounding=rounding, loss=own)
    how = Analyzing(
        scoring,
        num_calib or CALIBRATION,
        target,
        None if locked is None else _policy(locked),
        LatencyProfile.load(Path(profile)) if isinstance(profile, str | Path) else profile,
        MINIMIZE[minimize],
        validate=validate,
    )
    limits = _limits(budget)
    subject = asked.subject(Wanted(how.samples, _held_out(limits, validate), seed))
    return find_policy(subject, limits, how, Run(seed=seed, device=device, progress=progress))


def ptq(
    model: Model,
    data: Data | None = None,
    policy: Policy | Analysis | str | Path | None = None,
    *,
    validation: Data | None = None,
    normalize: str = "",
    outputs: Mapping[str, OutputKind] | None = None,
    calibration: Method = "mse",
    effort: Effort = "good",
    equalize: Equalize = "auto",
    iterations: int = Learning.iterations,
    num_calib: int | None = None,
    memory_mb: float = MEMORY_MB,
    dynamic: bool = False,
    int16_form: Int16Form | None = None,
    metric: Any = None,
    postprocess: Callable[[Any], Any] | str | None = None,
    lower_is_better: bool = False,
    seed: int = 0,
    progress: Progress = silent,
) -> Quantized:
    """Quantize without training, as `mpq ptq` does.

    Args:
        model: a trained network, or its checkpoint.
        data: images to calibrate on.
        policy: widths per layer, or the analysis that found them; None: 8 bits everywhere.
        validation: images to measure on. None: further ones of `data`.
        normalize: what has been done to the images, as `--normalize`.
        outputs: kinds of outputs by name; None: as the policy says, or what is proposed.
        calibration: how activation ranges are chosen.
        effort: `fast`, `good` or `best`.
        equalize: whether channels are rescaled between layers.
        iterations: steps per block of effort `best`.
        num_calib: images to calibrate on. None: as many as the policy says.
        memory_mb: activations to hold in memory, in MiB.
        dynamic: linear layers that read floats take their range at run time.
        int16_form: of all 16-bit activations; None: as the policy says.
        metric: to measure on `validation` (`mpq.metrics.given`). None: top-1 where there is one.
        postprocess: what is applied to the outputs before they are judged.
        lower_is_better: of a metric that does not say so itself.
        seed: of all randomness.
        progress: called with (phase, done, all).

    Raises:
        DataError, GraphError: data or a network that cannot be taken.
        PolicyError: the policy does not fit the network, or was made for other weights.
    """
    chosen = _samples(_policy(policy), num_calib).with_outputs(outputs or {})
    wishes = Wishes(metric, lower_is_better, postprocess)
    asked = _Given(model, data, validation, wishes, normalize, chosen.outputs)
    subject = asked.subject(Wanted(chosen.data.samples, HELD_OUT, seed))
    _check_weights(chosen, subject)
    settings = PtqSettings(
        method=calibration,
        effort=effort,
        equalization=equalize,
        learning=Learning(iterations=iterations),
        memory_mb=memory_mb,
        dynamic=dynamic,
        int16_form=int16_form,
    )
    return run_ptq(chosen, subject, settings, Run(seed=seed, progress=progress))


def qat(
    model: Model,
    data: Data | None = None,
    policy: Policy | Analysis | str | Path | None = None,
    *,
    teacher: Ensemble | Model | None = None,
    loss: LossFunction | str | None = None,
    metric: Any = None,
    postprocess: Callable[[Any], Any] | str | None = None,
    lower_is_better: bool = False,
    validation: Data | None = None,
    normalize: str = "",
    outputs: Mapping[str, OutputKind] | None = None,
    transform: Transform | str | None = None,
    recipe: str | Recipe = "qat",
    epochs: int | None = None,
    settings: Mapping[str, object] | None = None,
    int16_form: Int16Form | None = None,
    seed: int = 0,
    device: str = "cpu",
    folder: str | Path | None = None,
    resume: bool = False,
    hooks: Hooks | None = None,
) -> Quantized:
    """Quantize with training and distillation, as `mpq qat` does; `model` itself is not changed.

    All images are read once and kept in memory, and the recipe shifts and mirrors them; with a loss
    the batches of `data` are gone through as they come, in each epoch anew. Without labels, without
    a loss, and of a network that is no classifier, the float network or `teacher` teaches.

    Args:
        model: a trained network, or its checkpoint.
        data: images to train on, with class ids or without; with a loss batches as it takes them.
        policy: widths per layer, or the analysis that found them; None: 8 bits everywhere.
        teacher: a network or an ensemble, or its file.
        loss: of outputs and a batch, a scalar that is a mean over the batch.
        metric: what the best epoch is chosen by, on `validation` (`mpq.metrics.given`). None: the
            last epoch is taken.
        postprocess: what is applied to the outputs before they are judged.
        lower_is_better: of a metric that does not say so itself.
        validation: images to measure on. None: a tenth of `data`, which is not trained on.
        normalize: what has been done to the images, as `--normalize`.
        outputs: kinds of outputs by name; None: as the policy says, or what is proposed.
        transform: of each training picture, or its name, as `--transform`.
        recipe: its name, its file, or itself.
        epochs: instead of the recipe's.
        settings: other keys of the recipe.
        int16_form: of all 16-bit activations; None: as the policy says.
        seed: of all randomness.
        device: where to train, `cpu` or `cuda`.
        folder: keeps `checkpoint.pth` and `metrics.jsonl` while it trains; None: nothing is kept.
        resume: go on from what an interrupted training left in `folder`.
        hooks: called while it trains.

    Raises:
        DataError, GraphError, PolicyError: as `ptq`.
        TrainError: a loss that is not finite.
    """
    chosen = _policy(policy).with_outputs(outputs or {})
    chosen = take_form(chosen, int16_form) if int16_form is not None else chosen
    streams = loss is not None and as_batches(data) is not None
    wishes = Wishes(metric, lower_is_better, postprocess)
    own = None if loss is None else loss_of(loss)
    asked = _Given(model, data, validation, wishes, normalize, chosen.outputs, own)
    subject = asked.subject(Wanted(CALIBRATION if streams else None, 0, seed))
    _check_weights(chosen, subject)
    changes = dict(settings or {}) | ({} if epochs is None else {"epochs": epochs})
    loaded = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    random = transform_of(transform, subject.info.input[1:])
    plan = TrainingPlan(loaded.override(changes), _teacher(teacher, subject), transform=random)
    run = Run(None if folder is None else Path(folder), seed, device, resume)
    return run_qat(chosen, subject, plan, run, hooks, loss=own)


def _limits(budget: Any) -> list[Constraints]:
    """The limits of one budget, or of several; without one they limit nothing."""
    alone = budget is None or isinstance(budget, int | float | Constraints | Mapping)
    return [_constraints(one) for one in ([budget] if alone else budget)]


def _constraints(budget: Budget | None) -> Constraints:
    if budget is None or isinstance(budget, Constraints):
        return budget or Constraints()
    limits = dict(budget) if isinstance(budget, Mapping) else {"effective_bits": budget}
    return Constraints().replace(**limits)


def _held_out(budgets: list[Constraints], validate: int) -> int:
    """Images to measure on: where accuracy is a limit, or scores are to be measured against it."""
    if any(one.max_drop is not None for one in budgets):
        return MEASURED
    return HELD_OUT if validate else 0


def _policy(policy: Policy | Analysis | str | Path | None) -> Policy:
    if isinstance(policy, Analysis):
        return policy.policy
    if isinstance(policy, str | Path):
        return Policy.load(policy)
    return policy or Policy.uniform(8)


def _samples(policy: Policy, num_calib: int | None) -> Policy:
    count = num_calib or policy.data.samples or CALIBRATION
    return policy.replace(data=policy.data.replace(samples=count))


def _check_weights(policy: Policy, subject: Subject) -> None:
    """Refuse a policy that was found for other weights."""
    asked, found = policy.model and policy.model.sha256, subject.info.sha256
    if asked and found and asked != found:
        raise PolicyError(
            f"the policy was made for other weights: sha256 must be {asked[:12]}..., got "
            f"{found[:12]}.... Analyze this network, or take policy.replace(model=None)."
        )


def _teacher(teacher: Ensemble | Model | None, subject: Subject) -> Ensemble | None:
    """The teachers; images that were given as values reach them as they reach the student."""
    if teacher is None:
        return None
    if isinstance(teacher, nn.Module) and not isinstance(teacher, Ensemble):
        return Ensemble([Member(type(teacher).__name__, teacher, subject.normalize)])
    found = teacher if isinstance(teacher, Ensemble) else load_ensemble(Path(teacher))
    if subject.data_name != GIVEN:
        return found
    own, others = subject.info.normalize, {str(member.normalize) for member in found.members}
    if own and others - {own}:
        raise UsageError(
            f"teachers must want images normalized as these are ({own}). Got "
            f"{', '.join(sorted(others))}. Train on data by name, where each gets its own."
        )
    members = [replace(member, normalize=subject.normalize) for member in found.members]
    return Ensemble(members, top1=found.top1)
