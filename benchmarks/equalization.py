"""What equalization wins: a network whose channels were skewed, quantized with and without it.

The channels between two layers are multiplied by random factors of 1/32 to 32 and divided again by
the layer that reads them: the same function with the ranges that make a MobileNet hard to quantize.
Without a checkpoint a small MobileNetV2-like network is trained on the embedded digits first.
Accuracies are those of the exported files in onnxruntime on the test images.

    python benchmarks/equalization.py
    MPQ_DATA=... python benchmarks/equalization.py resnet20.pth --data cifar10 --normalize imagenet
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

import torch
from common import accuracy_of, answers, setting
from torch import Tensor, nn

from mpq.data import Normalization, load_arrays
from mpq.export import to_onnx
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import prepare, to_float
from mpq.pipeline.subject import DataSource, Subject, open_checkpoint
from mpq.pipeline.training import new_subject, training_data
from mpq.policy import Policy
from mpq.ptq import equalize, quantize_graph
from mpq.ptq.pairs import links
from mpq.rundir import Run
from mpq.train.evaluate import predict
from mpq.train.loop import fit
from mpq.train.plan import TrainingPlan
from mpq.train.recipe import Recipe
from mpq.userimport import trust

RECIPE = {"epochs": 8, "batch": 64, "lr": 0.1, "flip": False, "warmup_epochs": 1}
DECADES = 5.0
"""Channels are multiplied by 2^-5 to 2^5."""


class Inverted(nn.Sequential):
    """A 1x1, a depthwise and a linear 1x1 convolution, as in MobileNetV2 without the shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        wide = 4 * inputs
        super().__init__(
            nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False),
            nn.BatchNorm2d(wide), nn.ReLU(),
            nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip


class SmallMobile(nn.Sequential):
    """A stem, four inverted blocks and a classifier."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, 1, 1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            Inverted(12, 12, 1), Inverted(12, 20, 2), Inverted(20, 20, 1), Inverted(20, 32, 2),
            nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, classes),
        )  # fmt: skip


def trained(seed: int) -> Subject:
    """The small network, trained on the digits."""
    blank = new_subject("resnet20", DataSource("digits"), seed=seed)
    torch.manual_seed(seed)
    module, data = SmallMobile(blank.info.classes), blank.require_data("training")
    with tempfile.TemporaryDirectory() as folder:
        fit(
            module,
            training_data(blank),
            TrainingPlan(Recipe.load("plain").override(RECIPE)),
            Run(Path(folder), seed),
        )
    return Subject(module.eval(), blank.info, data, blank.data_name, blank.normalize)


@torch.no_grad()
def skew(graph: QuantGraph, seed: int) -> int:
    """Multiply channels by random factors where the next layer can divide; return how many."""
    generator, count = torch.Generator().manual_seed(seed), 0
    for link in links(graph):
        if link.reason or not bool(link.limit.isinf().all()):
            continue
        first, second = (graph.module.get_submodule(n) for n in (link.first, link.second))
        factor = 2 ** (DECADES * (2 * torch.rand(len(link.limit), generator=generator) - 1))
        column = factor.reshape(-1, *[1] * (first.weight.ndim - 1))  # type: ignore[operator,union-attr]
        first.weight.mul_(column)  # type: ignore[operator,union-attr]
        first.bias.mul_(factor)  # type: ignore[operator,union-attr]
        weight: Tensor = second.weight  # type: ignore[assignment]
        if getattr(second, "groups", 1) > 1:  # depthwise: one input channel each
            weight.div_(factor.reshape(-1, *[1] * (weight.ndim - 1)))
        else:
            each = weight.shape[1] // len(factor)
            weight.div_(factor.repeat_interleave(each).reshape(1, -1, *[1] * (weight.ndim - 2)))
        count += 1
    return count


def main() -> None:
    """Quantize each form with and without equalization, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--normalize", type=Normalization.parse)
    parser.add_argument("--widths", nargs="+", default=["8,8", "4,8"], help="weight,activation")
    parser.add_argument("--efforts", nargs="+", default=["fast", "good"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trust-code", default="", help="of a checkpoint of your own network")
    options = parser.parse_args()
    trust(options.trust_code)
    subject = (
        open_checkpoint(options.checkpoint, DataSource(options.data), normalize=options.normalize)
        if options.checkpoint
        else trained(options.seed)
    )
    images, labels = load_arrays(subject.require_data("the table").test)
    sample = subject.sample(512, options.seed, "calibration")
    exact = subject.graph()
    given = predict(exact.module, images, subject.normalize).argmax(1).numpy()
    print(json.dumps({"form": "float", **accuracy_of(given, labels)}))
    forms = product(("even", "skewed"), options.widths, options.efforts, ("off", "auto"))
    for form, widths, effort, mode in forms:
        graph = to_float(subject.module, sample[:2])
        if form == "skewed":
            skew(graph, options.seed)
        policy = Policy.uniform(*map(int, widths.split(",")))
        pairs = equalize(graph, sample, policy, mode=mode)
        quantized = quantize_graph(prepare(graph, policy), sample, effort=effort)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            to_onnx(quantized, path)
            given = answers(path, images, subject.normalize)
        row = {"form": form, "widths": widths, "effort": effort, "equalize": mode}
        row |= {"pairs": sum(not pair.reason for pair in pairs), **accuracy_of(given, labels)}
        print(json.dumps(row), flush=True)
    print(json.dumps(setting()))


if __name__ == "__main__":
    main()
