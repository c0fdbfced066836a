"""What a training is given, as values: images, and how and from whom to learn.

These go whole from the command line to the loop; what all stages of a run share (folder, seed,
device, whether to resume) is `mpq.rundir.Run`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpq.data import Normalization
from mpq.train.ensemble import Ensemble
from mpq.train.evaluate import Images, Labels
from mpq.train.metrics import Record
from mpq.train.recipe import Recipe
from mpq.train.weighting import Weighting

OnStep = Callable[[int, int, int, float], None]
"""(epoch, step, steps per epoch, loss), all from 0; on an accelerator every 16th step."""


@dataclass(frozen=True)
class TrainingData:
    """What a network is trained and judged on.

    Args:
        train: uint8 images `[n, H, W, 3]` and class ids `[n]`; -1: no label, and of that image only
            the teacher speaks.
        validation: the same, looked at after each epoch, never used to choose; None: nothing is.
        normalize: of the network's input; teachers have their own.
    """

    train: tuple[Images, Labels]
    validation: tuple[Images, Labels] | None
    normalize: Normalization


@dataclass(frozen=True)
class TrainingPlan:
    """How to train, and from whom to learn.

    Args:
        recipe: all hyper-parameters: optimizer, augmentation, distillation loss (`distill`: `kd`,
            `standardized`, `dkd`, `dist`), weighting of the teachers (`weighting`: `mean`, `vote`,
            `entropy`, `confidence`, `gradient`, `dynamic`).
        teacher: sees the same augmented images; None: labels alone teach.
        weighting: replaces the recipe's weighting of the teachers.
        answers: folder that keeps the teachers' logits, for other runs on the same images.
    """

    recipe: Recipe
    teacher: Ensemble | None = None
    weighting: Weighting | None = None
    answers: Path | None = None


class Stop(Exception):
    """Raised by `Hooks.on_epoch` to stop a training: it is saved, whatever `checkpoint_every` says.

    The training function raises it on; resumed, it goes on after that epoch.
    """


@dataclass(frozen=True)
class Hooks:
    """What is called while a training runs.

    Args:
        on_start: when all that can be refused has been looked at, before anything is written.
        on_step: after a step.
        on_epoch: with the record of each epoch, after it has been saved; may raise `Stop`.
    """

    on_start: Callable[[], object] | None = None
    on_step: OnStep | None = None
    on_epoch: Callable[[Record], object] | None = None
