"""Float networks: read from a file or trained, then kept in half precision.

What later stages use is the kept file, so every figure of the study belongs to weights that are
there to be measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.study.clock import Clock
from benchmarks.study.plan import Data, Network, Plan, checkpoint_file
from mpq import files
from mpq.checkpoint import Reading, load_model, save_model
from mpq.data import DataSet, Normalization, open_data, sample_indices
from mpq.data.dataset import Split, subset
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.pipeline.training import initial_weights, new_subject, run_train
from mpq.rundir import Run
from mpq.train.ensemble import Ensemble, load_ensemble
from mpq.train.evaluate import accuracy
from mpq.train.metrics import Record
from mpq.train.plan import Hooks, TrainingPlan
from mpq.train.recipe import Recipe

FILE = "model.pth"
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """Where and how a stage works.

    Args:
        plan: whose stage it is.
        folder: gets its files.
        seed: of everything random.
        device: `cpu` or `cuda`.
        answers: the folder of what teachers said, shared by all stages.
        clock: when to stop.
        tell: told what is being done.
    """

    plan: Plan
    folder: Path
    seed: int
    device: str
    answers: Path
    clock: Clock
    tell: Tell

    def training(self, recipe: Recipe, teachers: Sequence[Path]) -> TrainingPlan:
        """How to train, with files of other stages as teachers.

        What they say is kept where images come again: only there is it worth the disk.
        """
        answers = self.answers if teachers and recipe.cycle else None
        return TrainingPlan(recipe, teachers_of(teachers), answers=answers)

    def run(self) -> Run:
        """What mpq's stages share: this folder, seed and device, and that they resume."""
        return Run(self.folder, self.seed, self.device, resume=True)

    def hooks(self) -> Hooks:
        """Called while a training runs."""
        return Hooks(on_epoch=self.on_epoch)

    def on_epoch(self, record: Record) -> None:
        """A hook for training: tell an epoch, and stop where the next would not end in time.

        Raises:
            TimeUpError: it would not; the training has been saved.
        """
        val = "" if record["val_top1"] is None else f", validation {record['val_top1']:.2f} %"
        self.tell(
            f"  epoch {record['epoch'] + 1}: loss {record['train_loss']:.4f}{val}, "
            f"{record['seconds']:.1f} s"
        )
        self.clock.ask(1.2 * record["seconds"])


def source_of(data: Data) -> DataSource:
    """How mpq is told of the plan's images."""
    return DataSource(data.name, holdout=0 if data.choose != "holdout" else data.holdout)


def shaped(found: DataSet, data: Data) -> DataSet:
    """The splits as the plan wants them: what is chosen on, and how many images."""
    if data.choose != "holdout":
        found = replace(found, validation=subset(found.test, np.arange(len(found.test) // 2)))
    if data.train:
        found = replace(found, train=_some(found.train, data.train))
    if not data.limit:
        return found
    fewer = {
        name: _some(split, data.limit)
        for name in ("train", "validation", "test")
        if len(split := getattr(found, name))
    }
    return replace(found, **fewer)


def _some(split: Split, count: int) -> Split:
    return subset(split, sample_indices(split, count, 0))


def opened(data: Data) -> DataSet:
    """The plan's images."""
    source = source_of(data)
    return shaped(open_data(data.name, holdout=source.holdout), data)


def load_subject(path: Path, data: Data, unlabelled: str | None = None) -> Subject:
    """A network that a stage kept, with the plan's images, and more to learn without labels."""
    subject = open_checkpoint(path, replace(source_of(data), unlabelled=unlabelled))
    more = subject.unlabelled
    if more is not None and data.limit:
        more = _some(more, data.limit)
    return replace(subject, data=shaped(subject.require_data("the study"), data), unlabelled=more)


def teachers_of(paths: Sequence[Path]) -> Ensemble | None:
    """Networks that stages kept, as teachers; None without any."""
    if not paths:
        return None
    members = [replace(load_ensemble(p).members[0], name=p.parent.name) for p in paths]
    return Ensemble(members)


def keep(path: Path, subject: Subject, metrics: dict[str, Any]) -> None:
    """Write a network with its matrices in half precision; norms and biases stay whole."""
    state = subject.module.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.ndim > 1:
            state[name] = tensor.half()
    halves = _Holder(state)
    save_model(path, halves, info=subject.info, data=subject.data_name, metrics=metrics)


class _Holder(nn.Module):
    """A state dict in the place of a network, to be saved as one."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.state = state

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The state it was given."""
        return self.state


def make_network(
    job: Job, name: str, *, start: Path | None, teachers: Sequence[Path]
) -> dict[str, Any]:
    """Read or train a network of the plan; write `model.pth` into its stage's folder.

    `start` and `teachers` are files of other stages.
    """
    part, data = job.plan.network(name), job.plan.data
    begun = time.perf_counter()
    if not (job.folder / FILE).is_file():  # else a kill came between it and what is told of it
        if part.recipe is None:
            subject = _read(part, data)
        else:
            recipe = job.plan.recipe(part.recipe)
            subject = _trained(job, part, recipe, start, teachers)
        metrics = {"epochs": job.plan.epochs(part.recipe), "seed": job.seed}
        keep(job.folder / FILE, subject, metrics)
    return _told(job, part) | {"seconds": round(time.perf_counter() - begun, 1)}


def take_network(job: Job, name: str, file: Path) -> dict[str, Any]:
    """Take a network that an earlier study kept into its stage's folder, in place of training."""
    files.write_bytes(job.folder / FILE, file.read_bytes())
    return _told(job, job.plan.network(name)) | {"taken": str(file), "seconds": 0.0}


def _told(job: Job, part: Network) -> dict[str, Any]:
    """What is known of a network whose file is there."""
    found = load_subject(job.folder / FILE, job.plan.data)
    epochs = job.plan.epochs(part.recipe)
    return {
        "files": [FILE],
        "network": part.name,
        "arch": found.info.arch,
        "validation_top1": validation_top1(found),
        "epochs": epochs,
        "images_seen": epochs * len(found.require_data("the study").train),
        "parameters": sum(p.numel() for p in found.module.parameters()),
        "teachers": list(part.teachers),
    }


def _trained(
    job: Job, part: Network, recipe: Recipe, start: Path | None, teachers: Sequence[Path]
) -> Subject:
    """Train, or go on with it; what is trained already is only read."""
    subject = fresh(part, job.plan.data, start, job.seed)
    path = job.folder / "trained.pth"
    if not path.is_file():
        run_train(subject, job.training(recipe, teachers), path, job.run(), job.hooks())
    return replace(subject, module=load_model(path, arch=part.arch).module)


def validation_top1(subject: Subject) -> float | None:
    """Percent right of the images to choose on; None without any."""
    held = subject.held_out()
    if held is None:
        return None
    return round(accuracy(subject.module, *held, subject.normalize), 3)


def _read(part: Network, data: Data) -> Subject:
    assert part.checkpoint is not None
    how = Normalization.parse(part.normalize) if part.normalize else None
    subject = open_checkpoint(
        checkpoint_file(part.checkpoint), source_of(data), reading=Reading(part.arch), normalize=how
    )
    return replace(subject, data=shaped(subject.require_data("the study"), data))


def fresh(part: Network, data: Data, start: Path | None, seed: int) -> Subject:
    """A network to train: random, or as another one left it."""
    if start is not None:
        subject = load_subject(start, data)
        if part.arch in (None, subject.info.arch):
            return subject
    assert part.arch is not None
    how = Normalization.parse(part.normalize) if part.normalize else None
    subject = new_subject(part.arch, source_of(data), normalize=how, seed=seed)
    if start is not None:
        initial_weights(subject, start)  # refuses another architecture
    return replace(subject, data=shaped(subject.require_data("the study"), data))
