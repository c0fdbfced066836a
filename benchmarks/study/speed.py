"""The time of an epoch of each network, measured before anything long begins."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study.networks import Job, fresh
from mpq.data import sample_indices
from mpq.data.dataset import subset
from mpq.pipeline.training import run_train
from mpq.rundir import Run
from mpq.train.metrics import Record
from mpq.train.plan import Hooks, TrainingPlan

STEPS = 24
"""Of each epoch that is timed; the first epoch warms up and is not counted."""


def measure_speed(job: Job, names: Iterable[str]) -> dict[str, Any]:
    """Seconds of an epoch by network, each architecture and recipe once, without teachers.

    A teacher adds about a third of its own epoch to that of its student while it answers.
    """
    found: dict[str, float] = {}
    for name in names:
        part = job.plan.network(name)
        if part.recipe is None or part.arch is None:
            continue
        recipe = job.plan.recipe(part.recipe)
        told = f"{part.arch} at {recipe.batch} images"
        if told not in found:
            found[told] = round(_seconds(job, name), 2)
            job.tell(f"  {told}: {found[told]:.1f} s an epoch")
    return {"seconds": found}


def _seconds(job: Job, name: str) -> float:
    """Of an epoch over all training images, from one over a few batches of them."""
    part = job.plan.network(name)
    assert part.recipe is not None
    recipe = job.plan.recipe(part.recipe).override(
        {"epochs": 2, "cycle": 0, "warmup_epochs": 0, "progressive_epochs": 0}
    )
    subject = fresh(part, job.plan.data, None, job.seed)
    data = subject.require_data("the study")
    few = subset(data.train, sample_indices(data.train, STEPS * recipe.batch, 0))
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as folder:
        run_train(
            replace(subject, data=replace(data, train=few, validation=subset(few, []))),
            TrainingPlan(recipe),
            Path(folder) / "timed.pth",
            Run(seed=job.seed, device=job.device),
            Hooks(on_epoch=records.append),
        )
    return float(records[-1]["seconds"]) * len(data.train) / len(few)
