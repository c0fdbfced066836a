"""What share of a training step is making its images: indexing, augmentation, mixing, normalizing.

For each recipe the batches are made and a network learns from them, in turn, in one process; times
are CPU seconds of the process in milliseconds, medians over the rounds. `parts_ms` says what it
is made of. Images are random: what a change costs does not depend on what is in them.

    python benchmarks/loading.py [--models resnet20] [--recipes plain strong] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from common import setting
from qat_step import batch_of, network, stepper
from torch import Tensor

from mpq.data import Normalization
from mpq.train.augment import augment, mix
from mpq.train.evaluate import normalize_unit
from mpq.train.recipe import Recipe

COUNT = 4096
"""Images that batches are drawn from."""
CHANGES = ("crop", "flip", "trivial", "rand_operations", "erase", "mixup", "cutmix")
VARIANTS = ("float", "mpq w4a8")
WITH_RAND = "strong, RandAugment"


def recipe_of(name: str) -> Recipe:
    """A recipe that ships with mpq, or the strong one with RandAugment for TrivialAugment."""
    if name != WITH_RAND:
        return Recipe.load(name)
    return Recipe.load("strong").override({"trivial": False, "rand_operations": 2})


def without(recipe: Recipe, *keys: str) -> Recipe:
    """The recipe with these changes of images off."""
    return recipe.override({key: type(getattr(recipe, key))(0) for key in keys})


def loader(recipe: Recipe, images: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    """What the engine does for the images of one step."""
    rng, normalize = np.random.default_rng(0), Normalization.parse("cifar10")

    def load() -> Tensor:
        index = torch.from_numpy(rng.integers(len(images), size=recipe.batch))
        made, _ = mix(augment(images[index], recipe, rng), labels[index], recipe, rng)
        return normalize_unit(made, normalize).contiguous(memory_format=torch.channels_last)

    return load


def milliseconds(work: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU time of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, one in work.items():
            start = time.process_time()
            one()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: float(np.median(found[1:])) for name, found in times.items()}


def main() -> None:
    """Measure and print a JSON line per model and recipe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["resnet20", "mobilenet_v2_cifar"])
    parser.add_argument("--recipes", nargs="+", default=["plain", "qat", "strong", WITH_RAND])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    shape = (COUNT, 32, 32, 3)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (COUNT,), generator=generator)
    for model in options.models:
        work: dict[str, Callable[[], object]] = {}
        for variant in VARIANTS:
            work[variant] = stepper(network(model, variant), *batch_of(128), bf16=False)
        for name in options.recipes:
            recipe = recipe_of(name)
            work[name] = loader(recipe, images, labels)
            for key in [k for k in CHANGES if getattr(recipe, k)]:
                others = [k for k in CHANGES if k != key]
                work[f"{name}: {key}"] = loader(without(recipe, *others), images, labels)
            work[f"{name}: rest"] = loader(without(recipe, *CHANGES), images, labels)
        found = milliseconds(work, options.rounds)
        for name in options.recipes:
            parts = {k.partition(": ")[2]: v for k, v in found.items() if k.startswith(f"{name}: ")}
            rest = parts.pop("rest")
            load = found[name]
            row: dict[str, object] = {"model": model, "recipe": name, "load_ms": round(load, 1)}
            row |= {f"% of {v}": round(100 * load / (load + found[v]), 1) for v in VARIANTS}
            row["parts_ms"] = {k: round(v - rest, 1) for k, v in parts.items()}
            row["parts_ms"] |= {"rest": round(rest, 1)}
            print(json.dumps(row), flush=True)
    print(json.dumps(setting() | {"threads": options.threads}))


if __name__ == "__main__":
    main()
