"""Where the values of the worst layers lie, and which of them their integers cover: for the report.

Weights are counted in steps of their channel, so that one picture holds for all channels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpq import files, origins, rundir
from mpq.calls import Inputs, call, count
from mpq.data import DataSource
from mpq.errors import DataError, MpqError
from mpq.graph.passes import prepare
from mpq.hooks import hooked
from mpq.noise import EXACT_DB
from mpq.numerics import fake_quantize, sqnr_db
from mpq.pipeline.exporting import held_out
from mpq.pipeline.quantizing import Quantized, load_quantized
from mpq.pipeline.subject import policy_subject
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.spec import QuantSpec

FILE = "ranges.json"
BINS = 80
IMAGES = 32
SAME_DB = 3.0
"""Weights that are nearer to those of the checkpoint are those, rounded."""
WORST = 6
"""How many layers are shown."""


def write_ranges(folder: Path, quantized: Path) -> None:
    """Write `ranges.json` into a run, unless there is one of this network.

    Args:
        folder: the run.
        quantized: its network; without its images, ranges of weights alone are written.

    Raises:
        MpqError: the network cannot be read.
    """
    path = folder / FILE
    if path.is_file() and not origins.doubt(path) and origins.is_of(path, quantized.name):
        return
    origins.require(quantized)
    try:
        found = load_quantized(quantized, DataSource(None))
        images = held_out(found.subject, IMAGES, seed=0)
    except DataError:
        found, images = load_quantized(quantized, DataSource("none")), None
    names = worst(folder, found)
    text = json.dumps(ranges(found, names, images, _before(quantized, found)))
    with rundir.held(folder):
        if origins.origins(folder):
            origins.keep(folder, FILE, text, "report", [quantized])
        else:
            files.write_text(path, text)


def worst(folder: Path, found: Quantized) -> list[str]:
    """The layers that cost most at their widths: by the scores, else by the noise of weights."""
    layers = _layers(found.module)
    path = folder / "sensitivity.json"
    if path.is_file() and not origins.doubt(path):
        scores = _scores(json.loads(path.read_text(encoding="utf-8")), layers)
        return sorted(layers, key=lambda n: -scores.get(n, 0.0))[:WORST]
    return sorted(layers, key=lambda n: _weights(layers[n])["sqnr"] or EXACT_DB)[:WORST]


def _scores(sensitivity: Mapping[str, Any], layers: Mapping[str, QuantLayer]) -> dict[str, float]:
    """What each layer is predicted to cost at the widths that it has."""
    total: dict[str, float] = {}
    for row in sensitivity["rows"]:
        layer = layers.get(row["layer"])
        if layer is None:
            continue
        spec = layer.goal if row["part"] == "weight" else layer.source and layer.source.goal
        if spec and spec.bits == row["bits"]:
            total[row["layer"]] = total.get(row["layer"], 0.0) + row["score"]
    return total


@torch.no_grad()
def ranges(
    found: Quantized, names: Sequence[str], images: Inputs | None, original: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Histograms of weights and inputs of some layers, and the ranges that were chosen.

    Args:
        found: the network.
        names: of layers.
        images: inputs as the network takes them (`mpq.calls`); None: weights alone.
        original: weights before they were rounded, by layer, where they are known.
    """
    layers = {name: m for name, m in _layers(found.module).items() if name in names}
    seen: dict[int, dict[str, Any]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(module, FakeQuant)
        low = -module.zero_point * module.step()
        seen[id(module)] = _histogram(args[0], module.spec, module.step(), float(low))

    sources = {layer.source for layer in layers.values() if layer.source is not None}
    if images is not None:
        with hooked(source.register_forward_pre_hook(look) for source in sources):
            call(found.module, images)
    rows = [
        {
            "layer": name,
            "weight": _weights(layers[name], original.get(name)),
            "activation": seen.get(id(layers[name].source)),
        }
        for name in names
    ]
    used = 0 if images is None else count(images)
    return {"images": used, "data": found.policy.data.name, "layers": rows}


@torch.no_grad()
def _weights(layer: QuantLayer, original: Tensor | None = None) -> dict[str, Any]:
    """Weights in steps of their channel.

    They are those before rounding, unless training or equalization has changed them since.
    """
    steps = _in_steps(layer, layer.weight)
    if original is not None and original.shape == layer.weight.shape:
        before = _in_steps(layer, original)
        kept = before.clamp(layer.spec.qmin, layer.spec.qmax)
        steps = before if sqnr_db(kept, steps) > SAME_DB else steps
    return _histogram(steps, layer.spec, torch.ones(()), float(layer.spec.qmin))


def _in_steps(layer: QuantLayer, weight: Tensor) -> Tensor:
    flat = weight.detach().transpose(0, layer.op.axis).flatten(1)
    return flat / layer.step().reshape(-1, 1)


def _layers(module: nn.Module) -> dict[str, QuantLayer]:
    return {n: m for n, m in module.named_modules() if isinstance(m, QuantLayer)}


def _before(quantized: Path, found: Quantized) -> dict[str, Tensor]:
    """The weights of the checkpoint, batch norms folded in; nothing where it is gone.

    Nothing either of a training, whose weights are other ones: these are shown as the file has
    them, rounded.
    """
    if found.metrics.get("stage") == "qat":
        return {}
    source = DataSource("none")
    try:
        subject = policy_subject(found.policy, quantized, source, weights=True)
        layers = _layers(prepare(subject.graph(), found.policy).module)
    except MpqError:
        return {}
    return {name: layer.weight for name, layer in layers.items()}


def _histogram(x: Tensor, spec: QuantSpec, step: Tensor, low: float) -> dict[str, Any]:
    """Counts of values, and how those outside the range and those between steps suffer."""
    x, high = x.float(), low + float(step) * (spec.qmax - spec.qmin)
    zero = torch.round(spec.qmin - low / step).to(torch.int32)
    noise = sqnr_db(x, fake_quantize(x, step, zero, spec))
    ends = [float(v) for v in torch.aminmax(x)]
    outside = (x < low - float(step) / 2) | (x > high + float(step) / 2)
    return {
        "bits": spec.bits,
        "low": ends[0],
        "high": ends[1],
        "counts": [int(c) for c in torch.histc(x, BINS, *ends)],
        "from": low,
        "to": high,
        "clipped": float(outside.double().mean()),
        "sqnr": noise if math.isfinite(noise) else None,
    }
