"""The table of docs/portability.md: networks and storage forms in every runtime at hand.

`python benchmarks/portability.py [--only NAME ...] [--runtime NAME ...] [--images 128]` writes
`build/portability/NAME.json` for each case and prints the table. ResNet-20 is the CIFAR-10
checkpoint of `$MPQ_DATA`, on its test images; the other networks have random weights and take
noise, which is harder on rounding than pictures. `mpq portability --install` gets the runtimes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import mpq
from mpq import _torchvision
from mpq.checkpoint import load_model
from mpq.data import Normalization, open_data, sample_indices
from mpq.export import float_to_onnx, to_onnx
from mpq.export.foreign import chosen
from mpq.export.pixels import PixelInput
from mpq.export.portability import portability
from mpq.policy import DefaultSpec, LayerPolicy, Policy
from mpq.ptq import calibrate, quantize_layers
from mpq.report.grid import Grid, columns, plain
from mpq.spec import DYNAMIC, ROUNDED_16, activation_spec, weight_spec

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "build" / "portability"
DATA = ROOT.parent / "shared" / "data"
EVERYWHERE = "onnxruntime-cpu,arm64,wasm,openvino"
IMAGENET = Normalization.parse("imagenet")
SIDE = 64
"""Pixels of the networks with random weights: emulated CPUs are slow."""


@dataclass(frozen=True)
class Case:
    """One file: weight bits of every third layer and of the others, and how it is written."""

    net: str = "resnet20"
    narrow: int = 4
    target: str = EVERYWHERE
    activation: str = "uint8/tensor"
    options: dict[str, Any] = field(default_factory=dict)
    pixels: bool = False
    dynamic: bool = False


class Upsampler(nn.Module):
    """An encoder and two transposed convolutions, with and without overlap."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 24, 3, 2, 1))
        self.up = nn.Sequential(
            nn.ConvTranspose2d(24, 16, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, 2)
        )
        self.classify = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.classify(torch.relu(self.up(torch.relu(self.down(x)))).mean((2, 3)))


CASES = {
    "resnet20 8/4": Case(),
    "resnet20 8/4 for avx2": Case(target="avx2,arm64,wasm,openvino"),
    "resnet20 8/4 uint8 input": Case(pixels=True),
    "resnet20 8/4 unpack": Case(target="onnxruntime-cpu", options={"int4_format": "unpack"}),
    "resnet20 8/4 dq": Case(target="onnxruntime-cpu", options={"int4_format": "dq"}),
    "resnet20 8/3": Case(narrow=3, target="onnxruntime-cpu"),
    "resnet20 8/2 INT2": Case(narrow=2, target="onnxruntime-cpu", options={"min_runtime": "1.26"}),
    "resnet20 8/4 A4": Case(activation="uint4/tensor"),
    "resnet20 W16 fast": Case(narrow=16, activation="int16/tensor"),
    "resnet20 W16 exact": Case(narrow=16, activation=str(ROUNDED_16)),
    "resnet18 8/4": Case("resnet18"),
    "mobilenet_v2 8/4": Case("mobilenet_v2"),
    "mobilenet_v3_large 8/4": Case("mobilenet_v3_large"),
    "efficientnet_b0 8/4": Case("efficientnet_b0"),
    "vit, dynamic linear layers": Case("vit", target="onnxruntime-cpu,arm64,wasm", dynamic=True),
    "transposed convolutions 8/4": Case("upsampler"),
}


def network(name: str) -> nn.Module:
    """The float network."""
    if name == "resnet20":
        return load_model(DATA / "checkpoints" / "resnet20-cifar10.pth").module
    torch.manual_seed(0)
    models = _torchvision.models()
    if name == "upsampler":
        return Upsampler().eval()
    if name == "vit":
        size = {"image_size": SIDE, "patch_size": 16, "num_layers": 3, "num_heads": 4}
        made = models.VisionTransformer(**size, hidden_dim=96, mlp_dim=192, num_classes=10)
        nn.init.normal_(made.heads.head.weight, std=0.2)  # torchvision's zeros tell nothing apart
        return made.eval()
    return models.get_model(name, weights=None, num_classes=10).eval()


def sample(name: str, count: int) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Pixels `[n, H, W, 3]`, and labels where there are any."""
    if name == "resnet20":
        split = open_data("cifar10", root=DATA).compared
        indices = sample_indices(split, count, 0)
        return split.read(indices), np.asarray(split.labels)[indices]
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8), None


def policy(case: Case, layers: list[str]) -> Policy:
    """Every third layer narrow, the first and the last never; a whole net of 16 bits is one."""
    activation = activation_spec(
        int(case.activation.partition("/")[0].removeprefix("uint").removeprefix("int"))
    )
    if case.activation == str(ROUNDED_16):
        activation = ROUNDED_16
    if case.narrow == 16:
        default = DefaultSpec(weight=weight_spec(16), activation=activation)
        return Policy(target=case.target, default=default)
    entries = [LayerPolicy(name=n, weight=weight_spec(case.narrow)) for n in layers[1:-1][::3]]
    made = Policy(target=case.target, layers=entries)
    if case.activation != "uint8/tensor":
        made = made.replace(default=DefaultSpec(weight=weight_spec(8), activation=activation))
        made = made.with_layers(LayerPolicy(name=layers[0], activation=activation_spec(8)))
    return made


def build(case: Case, folder: Path, pixels: NDArray[np.uint8]) -> tuple[Path, Path]:
    """The file of a case and the float file of its network."""
    net, seen = network(case.net), torch.from_numpy(IMAGENET.apply(pixels[:64]))
    graph = mpq.to_float(net, seen[:2])
    plain_file = float_to_onnx(graph, folder / "float.onnx")
    chosen_policy = policy(case, list(graph.layers))
    if case.dynamic:
        inner = [
            n for n, layer in graph.layers.items() if layer.kind == "linear" and "encoder" in n
        ]
        entries = [LayerPolicy(name=n, activation=DYNAMIC) for n in inner]
        chosen_policy = chosen_policy.with_layers(*entries)
    prepared = mpq.prepare(net, chosen_policy, seen[:2])
    calibrate(prepared, seen, method="minmax")
    quantize_layers(prepared, seen, learn_rounding=False, correct_bias=False)
    raw = PixelInput(IMAGENET, True) if case.pixels else None
    result = to_onnx(prepared, folder / "model.onnx", pixels=raw, **case.options)
    return result.path, plain_file


def measure(name: str, case: Case, count: int, runtimes: tuple[str, ...]) -> dict[str, Any]:
    """One case in every runtime."""
    folder = OUT / name.replace("/", "-").replace(" ", "_").replace(",", "")
    folder.mkdir(parents=True, exist_ok=True)
    pixels, labels = sample(case.net, max(count, 64))
    file, float_file = build(case, folder, pixels)
    pixels = pixels[:count]
    images = pixels if case.pixels else IMAGENET.apply(pixels)
    found = portability(
        file,
        images,
        labels=None if labels is None else labels[:count],
        float_file=float_file,
        runtimes=[r for r in chosen(runtimes) if r.there],
        progress=lambda what: print(f"  {what}", flush=True),
    )
    told = {"case": name, "bytes": file.stat().st_size, **json.loads(found.to_json())}
    (folder.with_suffix(".json")).write_text(json.dumps(told, indent=1) + "\n")
    return told


def rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Lines of the table."""
    show: Callable[[Any], str] = lambda x: "-" if x is None else str(x)  # noqa: E731
    for row in found["rows"]:
        layers = f"{show(row['integer'])} of {row['layers']}"
        cells = (f"{show(row[key])} of {row['n']}" for key in ("predicted", "same_class"))
        speed = "-" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        answers = (layers, *cells, show(row["top1"]), speed, "")
        yield (
            found["case"],
            row["runtime"],
            *(answers if row["n"] else ("",) * 5 + (row["problem"],)),
        )


def main() -> None:
    """Measure what is asked for, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--runtime", nargs="*", default=[])
    parser.add_argument("--images", type=int, default=128)
    asked = parser.parse_args()
    heads = columns(
        "file", "runtime", "integer", "predicted", "same class", "top-1", "speed", "problem"
    )
    for name in asked.only:
        print(name, flush=True)
        try:
            found = measure(name, CASES[name], asked.images, tuple(asked.runtime))
        except mpq.errors.MpqError as error:
            print(f"  {error}")
            continue
        print(plain([Grid(name, heads, tuple(rows(found)))]), flush=True)


if __name__ == "__main__":
    main()
