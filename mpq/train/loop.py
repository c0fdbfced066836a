"""The training loop: one function, `fit`, for float models, teachers and prepared (QAT) models.

An interrupt (Ctrl-C, kill) at any moment leaves the last saved epoch in the folder, and a resumed
run ends with the same weights as one that was never interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mpq.data import Normalization
from mpq.train.engine import Engine, OnStep
from mpq.train.ensemble import Ensemble
from mpq.train.evaluate import Images, Labels, accuracy, check_images
from mpq.train.metrics import Record
from mpq.train.recipe import Recipe
from mpq.train.resume import CHECKPOINT
from mpq.train.weighting import Weighting

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FitResult:
    """What a run gives.

    Args:
        history: one record per epoch, as in `metrics.jsonl`.
        top1: validation accuracy in percent after the last epoch; None without validation.
        start: the same before the first epoch, of the model as it was given, also when resumed.
    """

    history: list[Record]
    top1: float | None
    start: float | None


def fit(
    model: nn.Module,
    *,
    train: tuple[Images, Labels],
    validation: tuple[Images, Labels] | None,
    normalize: Normalization,
    recipe: Recipe,
    folder: Path,
    teacher: Ensemble | None = None,
    weighting: Weighting | None = None,
    resume: bool = False,
    seed: int = 0,
    device: str = "cpu",
    answers: Path | None = None,
    on_step: OnStep | None = None,
    on_epoch: Callable[[Record], None] | None = None,
) -> FitResult:
    """Train `model` in place; afterwards it holds the last epoch's weights (or their average).

    Args:
        model: normalized images `[B, 3, H, W]` to logits `[B, C]`; parameters whose name ends in
            `scale` are quantizer steps. It is left on `device`, in eval mode.
        train: uint8 images `[n, H, W, 3]` and class ids `[n]`; -1: no label, and of that image only
            the teacher speaks.
        validation: the same, looked at after each epoch, never used to choose.
        normalize: of the model's input; teachers have their own.
        recipe: all hyper-parameters.
        folder: gets `checkpoint.pth` and `metrics.jsonl`; older ones are replaced.
        teacher: sees the same augmented images.
        weighting: replaces the recipe's weighting of the teachers.
        resume: continue from `checkpoint.pth` if there is one.
        seed: of data order, augmentation and dropout.
        device: `cpu` or `cuda`.
        answers: folder that keeps the teachers' logits, for other runs on the same images.
        on_step: called after a step.
        on_epoch: called with the record of each epoch, after it has been saved.

    Raises:
        DataError: images or labels that do not fit, or no label where there is no teacher.
        TrainError: a loss that is not finite (names the first module at fault), or a checkpoint of
            another run.
        UsageError: a device that is not there, or no compiler where the recipe wants one.
    """
    check_images(*train, partial=teacher is not None)
    if validation is not None:
        check_images(*validation)
    engine = Engine(
        model,
        train,
        normalize=normalize,
        recipe=recipe,
        teacher=teacher,
        weighting=weighting,
        seed=seed,
        device=device,
        answers=answers,
    )
    state = engine.state
    with engine.environment():
        start = accuracy(model, *validation, normalize) if validation is not None else None
        _begin(engine, folder, resume=resume)
        while state.epoch < recipe.epochs:
            started = time.perf_counter()
            record = engine.train_epoch(state.epoch, on_step)
            if validation is not None:
                record["val_top1"] = accuracy(state.evaluated, *validation, normalize)
            record["seconds"] = round(time.perf_counter() - started, 3)
            state.history.append(record)
            state.epoch += 1
            due = state.epoch % recipe.checkpoint_every == 0 or state.epoch == recipe.epochs
            if engine.main and due:
                state.save(folder)
            if on_epoch:
                on_epoch(record)
    if state.ema:
        model.load_state_dict(state.ema.module.state_dict())
    model.eval()
    return FitResult(state.history, state.history[-1]["val_top1"], start)


def _begin(engine: Engine, folder: Path, *, resume: bool) -> None:
    """Take over the folder's checkpoint, or write the first one."""
    folder.mkdir(parents=True, exist_ok=True)
    if resume and (folder / CHECKPOINT).exists():
        engine.state.load(folder)
        engine.lowering.restore(engine.state.epoch - 1)
        logger.info("resumed %s after epoch %d", folder, engine.state.epoch)
    elif engine.main:
        engine.state.save(folder)
