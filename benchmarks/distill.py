"""Quantization-aware training with and without teachers, judged on the exported files.

For ResNet-20 on CIFAR-10, from its checkpoint (or `--model`, such as the `model.pth` of a `float`
run): each configuration of widths is quantized without training, then trained for `--epochs` with
the teachers and without, exported to ONNX and run in onnxruntime on all test images. `float` is
trained and not quantized. Every measurement is a line of `distill.jsonl`; what is there already is
not measured again, and a training that was interrupted goes on from its checkpoint. The teachers'
answers are computed once and shared by all runs.

    mpq ensemble resnet32.pth resnet44.pth resnet56.pth --normalize imagenet -o ens.pth
    MPQ_DATA=... python benchmarks/distill.py --teachers ens.pth --only float --epochs 30
    MPQ_DATA=... python benchmarks/distill.py --teachers ens.pth --only 4.8 w4a4 --seeds 2 \
        --model runs/distill/float-teachers-base-seed0/model.pth --name from-distilled
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import UNIFORM, accuracy_of, answers, setting, uniform

from mpq.allocator import keep_freed
from mpq.analyze import Scoring, Search, build_policy, score_layers
from mpq.checkpoint import save_model
from mpq.cli.training import recipe_from
from mpq.data import Normalization, load_arrays, sample_indices
from mpq.data.dataset import subset
from mpq.export import float_to_onnx, to_onnx
from mpq.pipeline.quantizing import run_ptq, run_qat
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.policy import Constraints, DataInfo, Policy
from mpq.rundir import Run
from mpq.train.ensemble import Ensemble, load_ensemble
from mpq.train.loop import fit
from mpq.train.plan import Hooks, TrainingData, TrainingPlan
from mpq.train.recipe import Recipe

CHECKPOINTS = Path(os.environ.get("MPQ_DATA", ".")) / "checkpoints"
MIXED = {"16/8": ((16, 8), 12.0), "4.8": ((8, 4), 4.8), "4.2": ((8, 4), 4.2)}
"""Widths to choose from, and effective bits."""
CONFIGURATIONS = ("float", *UNIFORM, *MIXED)
TRAINING = ("none", "labels", "teachers")


def policy_for(configuration: str, subject: Subject) -> Policy:
    """The policy of a configuration, from one scoring on 512 images."""
    data = DataInfo(name=subject.data_name, samples=512, seed=0)
    named = {"model": subject.info, "data": data}
    if configuration in UNIFORM:
        return uniform(configuration, subject.graph().layers).replace(**named)
    bits, budget = MIXED[configuration]
    constraints = Constraints(effective_bits=budget)
    images = subject.sample(512, 0, "scoring")
    sensitivity = score_layers(subject.graph(), images, how=Scoring(bits=bits))
    chosen = Search(sensitivity).allocate(constraints)
    return build_policy(chosen, sensitivity, constraints=constraints, **named)


def fewer(subject: Subject, count: int) -> Subject:
    """The subject with no more than so many training images, each class equally often."""
    data = subject.require_data("training")
    some = subset(data.train, sample_indices(data.train, count, 0))
    return replace(subject, data=replace(data, train=some))


def make(
    configuration: str,
    training: str,
    seed: int,
    folder: Path,
    *,
    subject: Subject,
    recipe: Recipe,
    teacher: Ensemble,
) -> Path:
    """Train, quantize and export; returns the model file."""
    guide = teacher if training == "teachers" else None
    plan = TrainingPlan(recipe, guide, answers=folder.parent / "answers")
    run = Run(folder, seed, resume=True)
    hooks = Hooks(on_epoch=lambda record: print(json.dumps(record), flush=True))
    path = folder / "model.onnx"
    if configuration == "float":
        if training != "none":
            data = TrainingData(subject.learned(), None, subject.normalize)
            fit(subject.module, data, plan, run, hooks)
            save_model(folder / "model.pth", subject.module, info=subject.info, data="cifar10")
        return float_to_onnx(subject.graph(), path)
    policy = policy_for(configuration, subject)
    if training == "none":
        found = run_ptq(policy, subject, run=Run(seed=seed))
    else:
        found = run_qat(policy, subject, plan, run, hooks)
    to_onnx(found.graph, path)
    return path


def measure(configuration: str, training: str, seed: int, options: Any) -> dict[str, Any]:
    """One line of the table."""
    normalize = Normalization.parse("imagenet")
    source = DataSource("cifar10", holdout=options.holdout, unlabelled=options.unlabelled)
    subject = open_checkpoint(options.model, source, normalize=normalize)
    if options.labelled:
        subject = fewer(subject, options.labelled)
    teacher = load_ensemble(options.teachers)
    name = f"{configuration.replace('/', '-')}-{training}-{options.name}-seed{seed}"
    folder = options.out / name
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    path = make(
        configuration,
        training,
        seed,
        folder,
        subject=subject,
        recipe=options.recipe,
        teacher=teacher,
    )
    images, labels = load_arrays(subject.require_data("the table").test)
    result = accuracy_of(answers(path, images, normalize), labels)
    seconds = round(time.perf_counter() - start)
    return result | {"bytes": path.stat().st_size, "seconds": seconds}


def main() -> None:
    """Measure what is missing and print all that was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--train", nargs="+", choices=TRAINING, default=list(TRAINING))
    parser.add_argument("--model", type=Path, default=CHECKPOINTS / "resnet20-cifar10.pth")
    parser.add_argument("--teachers", type=Path, default=Path("ens.pth"), help="of mpq ensemble")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--recipe", default="qat")
    parser.add_argument("--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE")
    parser.add_argument("--holdout", type=int, metavar="N",
                        help="training images left out; 0: none")  # fmt: skip
    parser.add_argument("--labelled", type=int, metavar="N", help="so many training images only")
    parser.add_argument("--unlabelled", metavar="DATA", help="more images, for teachers alone")
    parser.add_argument("--name", default="base", help="of this recipe, in the table and on disk")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed()
    options.recipe = recipe_from(options.recipe, options.epochs, tuple(options.settings))
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "distill.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for seed in range(options.seeds):
        for configuration in options.only:
            for training in options.train:
                key = {"widths": configuration, "training": training, "seed": seed}
                key |= {"epochs": options.epochs if training != "none" else 0}
                key |= {"recipe": options.name}
                if any(key.items() <= row.items() for row in done):
                    continue
                row = key | measure(configuration, training, seed, options)
                done.append(row | {"settings": options.settings, "setting": setting()})
                with file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(done[-1]) + "\n")
    for row in done:
        print(json.dumps({k: v for k, v in row.items() if k not in ("setting", "settings")}))
    print(json.dumps(setting()))


if __name__ == "__main__":
    main()
