"""The training loop: one function, `fit`, for float models, teachers and prepared (QAT) models.

An interrupt (Ctrl-C, kill) at any moment leaves the last saved epoch in the folder, and a resumed
run ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mpq.batch import died
from mpq.errors import TrainError
from mpq.rundir import Run
from mpq.train.engine import Engine
from mpq.train.evaluate import accuracy, check_fits, check_images
from mpq.train.metrics import Record
from mpq.train.plan import Hooks, Judge, Stop, TrainingData, TrainingPlan
from mpq.train.resume import CHECKPOINT

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """What a run gives.

    Args:
        history: one record per epoch, as in `metrics.jsonl`.
        top1: validation accuracy in percent after the last epoch; None without validation.
        start: the same before the first epoch, of the model as it was given, also when resumed.
        value: of the judge's metric, of the epoch that was kept; None where none judges.
        before: the same before the first epoch.
    """

    history: list[Record]
    top1: float | None
    start: float | None
    value: float | None = None
    before: float | None = None


def fit(
    model: nn.Module,
    data: TrainingData,
    plan: TrainingPlan,
    run: Run | None = None,
    hooks: Hooks | None = None,
) -> FitResult:
    """Train `model` in place; afterwards it holds the last epoch's weights (or their average).

    Where a metric judges (`TrainingPlan.judge`) it holds those of the epoch that it finds best.

    Args:
        model: normalized images `[B, 3, H, W]` to logits `[B, C]`; parameters whose name ends in
            `scale` are quantizer steps. It is left on the run's device, in eval mode.
        data: what it is trained and judged on.
        plan: recipe and teachers.
        run: its folder gets `checkpoint.pth` and `metrics.jsonl`, older ones are replaced; its seed
            is that of data order, augmentation and dropout; it resumes from `checkpoint.pth` if
            there is one. By default nothing is kept.
        hooks: called on the way.

    Raises:
        DataError: images or labels that do not fit, or no label where there is no teacher.
        TrainError: a loss that is not finite (names the first module at fault), or a checkpoint of
            another run.
        UsageError: a device that is not there, no compiler where the recipe wants one, or a network
            whose first layer cannot be whitened.
        Stop: a hook did.
    """
    run, hooks = run or Run(), hooks or Hooks()
    if data.train is not None:
        check_images(*data.train, partial=plan.teacher is not None or plan.task is not None)
        check_fits(model, data.train[0], data.normalize)
    if data.validation is not None:
        check_images(*data.validation)
    engine = Engine(model, data, plan, run)
    state = engine.state
    with engine.environment():
        engine.whiten()
        start = _validate(model, data)
        before = None if plan.judge is None else plan.judge.value(model)
        if hooks.on_start:
            hooks.on_start()
        _begin(engine, run)
        while state.epoch < plan.recipe.epochs:
            _epoch(engine, data, plan.judge, run.folder, hooks)
    if state.ema:
        model.load_state_dict(state.ema.module.state_dict())
    if state.best is None:
        model.eval()
        return FitResult(state.history, state.history[-1]["val_top1"], start, None, before)
    model.load_state_dict(state.best["weights"])
    model.eval()
    kept = state.history[state.best["epoch"]]
    return FitResult(state.history, kept["val_top1"], start, kept["value"], before)


def _validate(model: nn.Module, data: TrainingData) -> float | None:
    """Accuracy in percent on the validation images, if there are any."""
    if data.validation is None:
        return None
    return accuracy(model, *data.validation, data.normalize)


def _keep_best(engine: Engine, judge: Judge, record: Record) -> None:
    """Measure an epoch, and keep its weights if none before was better.

    Epochs in which widths still come down are not those that were asked for.
    """
    state = engine.state
    record["metric"], record["value"] = judge.name, judge.value(state.evaluated)
    if state.epoch < engine.recipe.progressive_epochs:
        return
    sign = 1 if judge.higher else -1
    if state.best is None or sign * (record["value"] - state.best["value"]) > 0:
        weights = {k: v.detach().cpu().clone() for k, v in state.evaluated.state_dict().items()}
        state.best = {"epoch": state.epoch, "value": record["value"], "weights": weights}


def _epoch(
    engine: Engine, data: TrainingData, judge: Judge | None, folder: Path | None, hooks: Hooks
) -> None:
    """One epoch: train, measure, save."""
    state, recipe = engine.state, engine.recipe
    started = time.perf_counter()
    try:
        record = engine.train_epoch(state.epoch, hooks.on_step)
    except RuntimeError as error:
        raise died(error) or error from error
    _check_finite(engine)
    record["val_top1"] = _validate(state.evaluated, data)
    if judge is not None:
        _keep_best(engine, judge, record)
    record["seconds"] = round(time.perf_counter() - started, 3)
    state.history.append(record)
    state.epoch += 1
    due = state.epoch % recipe.checkpoint_every == 0 or state.epoch == recipe.epochs
    kept = folder if engine.main else None
    if due and kept is not None:
        state.save(kept)
    try:
        if hooks.on_epoch:
            hooks.on_epoch(record)
    except Stop:
        if not due and kept is not None:
            state.save(kept)
        raise


def _check_finite(engine: Engine) -> None:
    """Refuse what an epoch ends with before it takes the place of the epoch before.

    The loss of a step is looked at before its gradients are taken: those of the last one are not.
    """
    for name, weight in engine.model.named_parameters():
        if not bool(weight.isfinite().all()):
            raise TrainError(
                f"{name} became non-finite in the last steps of epoch {engine.state.epoch}. Try a "
                f"lower lr (now {engine.recipe.lr:g}) or clip_norm (now "
                f"{engine.recipe.clip_norm:g}); the checkpoint of the epoch before is intact."
            )


def _begin(engine: Engine, run: Run) -> None:
    """Take over the folder's checkpoint, or write the first one."""
    folder = run.folder
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if run.resume and (folder / CHECKPOINT).exists():
        engine.state.load(folder)
        engine.lowering.restore(engine.state.epoch - 1)
        logger.info("resumed %s after epoch %d", folder, engine.state.epoch)
    elif engine.main:
        engine.state.save(folder)
