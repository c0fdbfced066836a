"""What several processes run: a stream, a short training, scores of layers, and a command."""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from test_data_stream import epochs, feed, shards, working
from test_loop import NORMALIZE, pictures
from test_sensitivity import Net
from torch import nn

from mpq.analyze import Scoring, score_layers
from mpq.analyze.batches import gather
from mpq.cli import main
from mpq.graph.passes import to_float
from mpq.processes import leading, ranks_of
from mpq.rundir import Run
from mpq.train.ensemble import Ensemble, Member
from mpq.train.loop import fit
from mpq.train.plan import TrainingData, TrainingPlan
from mpq.train.recipe import Recipe


def linear(seed: int) -> nn.Sequential:
    """Without batch statistics and dropout, the shares of a batch add up to the batch."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def stream(out: Path) -> None:
    """Say which images of its share this process sees."""
    rank, ranks = ranks_of()
    assert ranks == 2
    with working(1):
        seen = epochs(feed((rank, ranks), shards(out / f"set{rank}")))
    np.save(out / f"seen{rank}.npy", np.array(seen))


def train(out: Path) -> None:
    """Train for two epochs, without augmentation: its random numbers differ by process.

    Every third image has no label, so that the processes' shares hold unlike numbers of labels.
    """
    model = linear(0)
    images, labels = pictures()
    labels[::3] = -1
    recipe = Recipe(epochs=2, batch=32, lr=0.05, crop=0, flip=False, ema=0.9)
    data = TrainingData((images, labels), None, NORMALIZE)
    plan = TrainingPlan(recipe, Ensemble([Member("t", linear(1), NORMALIZE)]))
    fit(model, data, plan, Run(out))
    rank, ranks = ranks_of()
    assert leading() == (rank == 0)
    assert gather({rank: rank}) == {r: r for r in range(ranks)}
    if leading():
        torch.save(model.state_dict(), out / "weights.pth")


def score(out: Path) -> None:
    """Score a network on batches that the processes share, and write scores and what was told."""
    torch.manual_seed(0)
    images, seen = torch.randn(24, 3, 8, 8), list[int]()
    graph = to_float(Net().eval(), images[:2])
    how = Scoring(metric="fisher", batch=7)
    found = score_layers(graph, images, how=how, progress=lambda done, total: seen.append(total))
    told = {"scores": found.to_json(), "batches": seen[-1]}
    (out / f"scores{ranks_of()[0]}.json").write_text(json.dumps(told))


def left(out: Path) -> None:
    """Called last as Python ends: by then the process must have left its group, or it may abort."""
    if not torch.distributed.is_initialized():
        (out / f"left{os.environ['RANK']}").touch()


if __name__ == "__main__":
    here = Path.cwd()
    atexit.register(left, here)
    stream(here)
    train(here)
    score(here)
    argv = ["train", "resnet8", "--data", "digits", "--epochs", "1", "--set", "batch=512"]
    sys.exit(main([*argv, "-o", "model.pth"]))
