"""Does it matter how the teachers of an ensemble are weighed? Students by weighting.

For each seed a student learns from the same initial weights and the same augmented images once by
every weighting, once from each single teacher and once from labels alone; so differences are
paired. The student is a small ResNet with random weights (by seed), or the network of `--student`
(seeds are then of order and augmentation). CIFAR-10's training images without the validation split,
top-1 on all test images and on both halves. Every run is a line of `weighting.jsonl` and leaves
`model.pth`, which may be a teacher of other runs; runs that are there are not repeated, and the
teachers' answers are computed once for all of a seed.

    mpq ensemble resnet32.pth resnet44.pth resnet56.pth --normalize imagenet -o ens.pth
    MPQ_DATA=... python benchmarks/weighting.py --teachers ens.pth --seeds 0 1 2 --epochs 10
    MPQ_DATA=... python benchmarks/weighting.py --teachers ens.pth --variants mean dynamic \
        --student resnet20-cifar10.pth --epochs 2 --set lr=0.02
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import accuracy_of, setting

from mpq.allocator import keep_freed
from mpq.checkpoint import save_model
from mpq.cli.training import recipe_from
from mpq.data import Normalization, load_arrays
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.pipeline.training import new_subject
from mpq.rundir import Run
from mpq.train.ensemble import Ensemble, load_ensemble
from mpq.train.evaluate import predict
from mpq.train.loop import fit
from mpq.train.plan import TrainingData, TrainingPlan
from mpq.train.recipe import Recipe
from mpq.train.weighting import WEIGHTINGS

LABELS = "labels"


def student_of(options: argparse.Namespace, seed: int) -> Subject:
    """The student of a seed, as it is before it learns."""
    source = DataSource("cifar10")
    if options.student:
        return open_checkpoint(options.student, source, normalize=Normalization.parse("imagenet"))
    return new_subject(f"resnet{options.depth}", source, seed=seed)


def learn(
    variant: str,
    seed: int,
    *,
    teachers: Ensemble,
    recipe: Recipe,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train one student; its accuracy."""
    subject = student_of(options, seed)
    student, data = subject.module, subject.require_data("training")
    folder = options.out / f"{variant}-{options.depth}-{seed}"
    single = [m for m in teachers.members if m.name == variant]
    teacher = None if variant == LABELS else Ensemble(single) if single else teachers
    if variant in WEIGHTINGS:
        recipe = recipe.override({"weighting": variant})
    start = time.perf_counter()
    fit(
        student,
        TrainingData(load_arrays(data.train), None, subject.normalize),
        TrainingPlan(recipe, teacher, answers=options.out / "answers"),
        Run(folder, seed if options.student else 0, resume=True),
    )
    save_model(folder / "model.pth", student, info=subject.info, data="cifar10")
    images, labels = load_arrays(data.test)
    found = accuracy_of(predict(student, images, subject.normalize).argmax(1).numpy(), labels)
    return found | {"seconds": round(time.perf_counter() - start)}


def table(rows: list[dict[str, Any]]) -> str:
    """Mean top-1 of each variant and its paired difference to `mean`, with standard errors."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        found[row["variant"]][row["seed"]] = row["top1"]
    lines = [f"{'variant':32} {'runs':>4} {'top-1':>14} {'to the mean':>14}"]
    for variant, runs in sorted(found.items(), key=lambda v: statistics.mean(v[1].values())):
        paired = [top1 - found["mean"][s] for s, top1 in runs.items() if s in found["mean"]]
        shown = "" if variant == "mean" or not paired else spread(paired, sign="+")
        lines.append(f"{variant:32} {len(runs):4} {spread([*runs.values()]):>14} {shown:>14}")
    return "\n".join(lines)


def spread(values: list[float], sign: str = "") -> str:
    """Mean and its standard error."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):{sign}.2f} ±{error:.2f}"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", type=Path, default=Path("ens.pth"), help="of mpq ensemble")
    parser.add_argument("--out", type=Path, default=Path("runs/weighting"))
    parser.add_argument("--variants", nargs="+", metavar="NAME",
                        help="labels, a weighting, or a teacher; all without it")  # fmt: skip
    parser.add_argument("--depth", type=int, default=8, help="of a student from scratch")
    parser.add_argument("--student", type=Path, metavar="FILE",
                        help="checkpoint to start from (ImageNet normalization)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed()
    recipe = recipe_from("plain", options.epochs, tuple(options.settings))
    teachers = load_ensemble(options.teachers)
    known = [LABELS, *WEIGHTINGS, *teachers.names]
    variants = options.variants or known
    if unknown := set(variants) - set(known):
        parser.error(f"--variants must be of {', '.join(known)}. Got {', '.join(unknown)}.")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "weighting.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    alike = {"student": str(options.student or f"resnet{options.depth}")}
    alike |= {"teachers": teachers.names, "epochs": options.epochs, "settings": options.settings}
    for seed in options.seeds:
        for variant in variants:
            key = alike | {"variant": variant, "seed": seed}
            if any(key.items() <= row.items() for row in rows):
                continue
            row = key | learn(variant, seed, teachers=teachers, recipe=recipe, options=options)
            rows.append(row)
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
    print(table([row for row in rows if alike.items() <= row.items()]))
    print(json.dumps(setting()))


if __name__ == "__main__":
    main()
