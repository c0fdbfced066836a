"""What a training is given, as values: images, and how and from whom to learn.

These go whole from the command line to the loop; what all stages of a run share (folder, seed,
device, whether to resume) is `mpq.rundir.Run`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from mpq.data import Normalization
from mpq.train.ensemble import Ensemble
from mpq.train.evaluate import Images, Labels
from mpq.train.metrics import Record
from mpq.train.recipe import Recipe
from mpq.train.task import Task
from mpq.train.transforms import Transform
from mpq.train.weighting import Weighting

OnStep = Callable[[int, int, int, float], None]
"""(epoch, step, steps per epoch, loss), all from 0; on an accelerator every 16th step."""


@dataclass(frozen=True)
class TrainingData:
    """What a network is trained and judged on.

    Args:
        train: uint8 images `[n, H, W, 3]` and class ids `[n]`; -1: no label, and of that image only
            the teacher speaks. None where there are batches.
        validation: the same, looked at after each epoch, never used to choose; None: nothing is.
        normalize: of the network's input; teachers have their own.
        batches: what a training loop has, learnt from as they come instead of `train`: a DataLoader
            or a list of batches, normalized. They need a task.
    """

    train: tuple[Images, Labels] | None
    validation: tuple[Images, Labels] | None
    normalize: Normalization
    batches: Iterable[Any] | None = None


@dataclass(frozen=True)
class Judge:
    """A metric by which the best epoch is kept.

    Args:
        name: of the metric.
        value: of a network.
        higher: whether more is better.
    """

    name: str
    value: Callable[[nn.Module], float]
    higher: bool = True


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
        task: what a network that is no classifier learns from, or any by another loss.
        judge: looks at the network after each epoch, and the best one is kept.
        transform: of each training picture as it lies in its file, by the workers that decode it;
            of batches, of each sample with its targets.
    """

    recipe: Recipe
    teacher: Ensemble | None = None
    weighting: Weighting | None = None
    answers: Path | None = None
    task: Task | None = None
    judge: Judge | None = None
    transform: Transform | None = None


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
