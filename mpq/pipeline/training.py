"""`train` and `ensemble`: float models, and the teachers that they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mpq import rundir, zoo
from mpq.checkpoint import Reading, open_model, save_model
from mpq.data import DataSet, DataSource, Normalization, load_arrays, open_data
from mpq.data.normalize import NAMED
from mpq.errors import DataError
from mpq.pipeline.guard import check_teacher
from mpq.pipeline.subject import Subject, subject_of, tell_pictures
from mpq.policy import ModelInfo
from mpq.processes import leading
from mpq.rundir import Run
from mpq.train.ensemble import Ensemble, Member, measure, member_of, read_teacher, save_ensemble
from mpq.train.loop import FitResult, fit
from mpq.train.plan import Hooks, TrainingData, TrainingPlan
from mpq.train.resume import CHECKPOINT
from mpq.zoo.libraries import declared_pictures

DEFAULT_NORMALIZE = {"cifar10": "cifar10", "cifar100": "cifar100", "digits": "none"}


def new_subject(
    arch: str, source: DataSource, *, normalize: Normalization | None = None, seed: int = 0
) -> Subject:
    """A network with random weights for a data set.

    Raises:
        UsageError: an unknown architecture.
        DataError: the data are missing.
    """
    channels, height, width = zoo.input_size(arch)
    name = source.data or "digits"
    opened = partial(open_data, name, root=source.root, holdout=source.holdout)
    native = opened()
    native.require_labels("training")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = zoo.build(arch, len(native.classes), in_channels=channels)
    declared, pictures = declared_pictures(module)
    size = native.size if (height, width) == (32, 32) else (height, width)
    same = (3, *native.size) == (channels, *size) and pictures is None
    data = native if same else opened(size=(channels, *size), pictures=pictures)
    usual = Normalization.parse(declared or DEFAULT_NORMALIZE.get(name, "imagenet"))
    normalize = normalize or (usual if usual.fits(channels) else NAMED["none"])
    info = ModelInfo(
        arch=arch,
        classes=len(data.classes),
        input=(channels, *data.size),
        normalize=str(normalize),
        pictures=pictures,
    )
    tell_pictures(info)
    return Subject(module, info, data, name, normalize, source.more(info.input, pictures))


def run_train(
    subject: Subject,
    plan: TrainingPlan,
    out: Path,
    run: Run | None = None,
    hooks: Hooks | None = None,
) -> FitResult:
    """Train a network and write its checkpoint to `out`.

    While it runs, the state to resume from lies in `working_folder(out)`; in the end only
    `metrics.jsonl` stays there.

    Args:
        subject: the network and its data, as `new_subject` or `open_checkpoint` gives them.
        plan: recipe and teachers.
        out: the checkpoint to write.
        run: seed, device and whether to resume; its folder does not matter.
        hooks: called on the way.

    Raises:
        CheckpointError: teachers of other classes.
        TrainError, DataError: as `mpq.train.loop.fit`.
    """
    check_teacher(plan.teacher, subject.info)
    folder = working_folder(out)
    run = replace(run or Run(), folder=folder)
    data = training_data(subject, in_files=plan.transform is not None)
    result = fit(subject.module, data, plan, run, hooks)
    if not leading():
        return result
    metrics = {"validation_top1": result.top1, "epochs": plan.recipe.epochs, "seed": run.seed}
    info = subject.info.replace(checkpoint="", sha256="")
    save_model(out, subject.module.cpu(), info=info, data=subject.data_name, metrics=metrics)
    (folder / CHECKPOINT).unlink()
    return result


def training_data(subject: Subject, *, in_files: bool = False) -> TrainingData:
    """The images of a network's data set, as `mpq.fit` takes them; see `Subject.learned`.

    Raises:
        DataError: there are no data.
    """
    return TrainingData(subject.learned(in_files=in_files), subject.held_out(), subject.normalize)


def working_folder(out: Path) -> Path:
    """Where the training of `model.pth` keeps its files: `model.train/`."""
    return out.with_suffix(".train")


def build_ensemble(
    paths: Sequence[Path],
    source: DataSource,
    *,
    normalize: Normalization | None = None,
    how: Reading | None = None,
) -> tuple[Ensemble, DataSet, str]:
    """Bundle checkpoints and measure them, one by one and together, on the validation split.

    A path may be an ensemble already: its members are taken over with their normalization, so that
    teachers which need different ones come together; `how` is for the others.

    Raises:
        CheckpointError: a file cannot be read, or the members differ in their classes.
        DataError: the data are missing.
    """
    members: list[Member] = []
    name, how = source.data or "", how or Reading()
    for path in paths:
        found = read_teacher(path, how)
        if isinstance(found, tuple):
            ensemble, known = found
            members += ensemble.members
        else:
            subject = subject_of(found, path, source, normalize=normalize)
            info, known = subject.info, subject.data_name
            members.append(member_of(path, subject.module, info, normalize=subject.normalize))
        name = name or known
    ensemble = Ensemble(members)
    if not name or name == "none":
        raise DataError("teachers are measured on images. Name a data set with --data.")
    data = open_data(name, root=source.root, size=members[0].input or (3, 32, 32))
    data.require_classes(members[0].classes)
    images, labels = load_arrays(data.validation)
    return measure(ensemble, images, labels), data, name


def write_ensemble(ensemble: Ensemble, path: Path, data: str, *, force: bool) -> None:
    """Write `ens.pth`.

    Raises:
        UsageError: it exists and `force` is off.
    """
    rundir.refuse_overwrite(path, force)
    save_ensemble(path, ensemble, data=data)


def initial_weights(subject: Subject, path: Path) -> None:
    """Start training from a checkpoint of the same architecture.

    Raises:
        CheckpointError: it is of another architecture.
    """
    loaded = open_model(path, Reading(subject.info.arch, subject.info.classes))
    subject.module.load_state_dict(loaded.module.state_dict())
