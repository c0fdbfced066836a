"""What a quantized network learns from in `qat`: labels, teachers, the float network, a loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mpq.data import DataSet, load_arrays
from mpq.data.cache import joined
from mpq.data.dataset import rows
from mpq.errors import DataError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import classifier
from mpq.metrics.given import LossFunction, own
from mpq.pipeline.evaluating import evaluation
from mpq.pipeline.guard import check_teacher
from mpq.pipeline.subject import Subject
from mpq.pipeline.training import training_data
from mpq.train.own import OwnStep
from mpq.train.plan import Judge, TrainingData, TrainingPlan
from mpq.train.recipe import Recipe
from mpq.train.task import Task


def lessons(
    graph: QuantGraph, subject: Subject, plan: TrainingPlan, loss: LossFunction | None
) -> tuple[TrainingPlan, TrainingData]:
    """The plan and the data of a QAT.

    A classifier learns from labels and teachers, as recipes say. All else learns from the user's
    loss, or from what the float network or a teacher answers, and so does a classifier whose images
    have no labels.

    Raises:
        CheckpointError: teachers of other classes.
        DataError: there are no data, or none that the loss can be computed from.
        UsageError: several teachers of a network that is no classifier.
    """
    judged = evaluation(subject, graph.outputs)
    if judged is not None:
        metric = judged.metric
        plan = replace(plan, judge=Judge(metric.name, judged.value, metric.higher))
    arrays = subject.batches is None and (subject.data is None or subject.data.pixels)
    plain = classifier(graph.outputs) and loss is None and arrays
    if plain and (plan.teacher is not None or (subject.data and subject.data.labelled)):
        check_teacher(plan.teacher, subject.info)
        return plan, training_data(subject, in_files=plan.transform is not None)
    task = _task(graph, subject, plan, loss)
    data = _data(subject, task, plan)
    if classifier(graph.outputs) and subject.data is not None and subject.data.pixels:
        data = replace(data, validation=subject.held_out())
    return replace(plan, task=task, teacher=None, answers=None), data


def _task(
    graph: QuantGraph, subject: Subject, plan: TrainingPlan, loss: LossFunction | None
) -> Task:
    kinds = {name: output.kind for name, output in graph.outputs.items()}
    if loss is own:
        if plan.teacher is not None:
            raise UsageError("--loss own is all that teaches then. Leave out --teacher.")
        return Task(kinds, None, loss, step=OwnStep(subject.module, graph))
    if plan.teacher is None:
        if loss is not None:
            return Task(kinds, None, loss)
        return Task(kinds, subject.module, None, name="the float network")
    if len(plan.teacher.members) > 1:
        raise UsageError(
            "a network that is no classifier, or has a loss of its own, learns from one teacher. "
            f"Got {', '.join(plan.teacher.names)}."
        )
    (member,) = plan.teacher.members
    other = None if member.normalize == subject.normalize else member.normalize
    return Task(kinds, member.module, loss, other, member.name)


def _batches(subject: Subject, data: DataSet, recipe: Recipe) -> list[Any]:
    """What is given as arrays by name of input, in batches with class ids where they are known."""
    samples, labels = load_arrays(data.train)
    found = []
    for at in range(0, max(len(labels) - recipe.batch + 1, 1), recipe.batch):
        part = slice(at, at + recipe.batch)
        inputs = subject.tensor(rows(samples, part))
        found.append((inputs, torch.from_numpy(labels[part])) if data.labelled else (inputs,))
    return found


def _data(subject: Subject, task: Task, plan: TrainingPlan) -> TrainingData:
    """Batches of the user's own, or all training images; classes where they are known."""
    if subject.batches is not None:
        return TrainingData(None, None, subject.normalize, subject.batches.train)
    data = subject.require_data("qat")
    if not data.pixels:
        return TrainingData(None, None, subject.normalize, _batches(subject, data, plan.recipe))
    images: Any
    images, labels = load_arrays(data.train, in_files=plan.transform is not None)
    if not data.labelled:
        labels = np.full(len(images), -1)
    if subject.unlabelled is not None:
        images, labels = joined((images, labels), subject.unlabelled)
    if task.loss is not None and task.teacher is None and (labels < 0).any():
        raise DataError(
            "--loss needs what it compares with, but the images come without labels. Give batches "
            "of inputs and targets with --batches module:factory, or leave the loss out: the float "
            "network then teaches."
        )
    return TrainingData((images, labels), None, subject.normalize)
