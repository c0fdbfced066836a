"""What is unusual about the tensors of a network: the causes that the rules of diagnosis look for.

A quantizer has one step for many values, so what costs accuracy is the few that stand far apart
from the rest. How much they cost is asked as a counterfactual: with `s` the scale of a row of
weights and `s'` the scale it would have without its outliers,

    share = 1 - |Q_s'(w) - w|^2 / |Q_s(w) - w|^2        over the rest of the row

is the part of the rest's rounding error that the outliers cause. For an activation with ranges `R`
and `R'` it is `1 - (R'/R)^2`. What a score, which grows with the squared error, would lose without
them is `part`: the same difference, over the error of the whole row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.calls import Inputs, count, take
from mpq.graph.ir import QuantGraph
from mpq.numerics import fake_quantize
from mpq.policy import Policy
from mpq.ptq.equalize import Look, equalize
from mpq.quant.operation import LayerOp
from mpq.quant.ranges import weight_scales
from mpq.spec import weight_spec

FORMAT = "mpq/tensors"
IMAGES = 64
FEW = 20
"""One channel in so many, and at least one, may stand apart."""
FEWEST = 4
"""Channels below which none stands apart from the others."""
VALUES = 64
"""One weight of a row in so many, and at least one, may be an outlier."""
SAMPLE = 2**18
"""Weights of a layer that are looked at, in whole rows."""
DEAD = 1e-7
"""A row of weights this small beside the largest multiplies nothing."""


@torch.no_grad()
def measure(
    graph: QuantGraph, images: Inputs | None, bits: Sequence[int], policy: Policy
) -> dict[str, Any]:
    """The content of `tensors.json`.

    Args:
        graph: in stage `float`; it is put into eval mode and not changed otherwise.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`), of which 64 are looked at; None:
            weights only.
        bits: widths of weights.
        policy: at whose widths the rescaling of channels between layers is judged.
    """
    graph.module.eval()
    shown = None if images is None else take(images, slice(IMAGES))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    pairs = [] if shown is None else _pairs(graph, shown, policy, seen)
    writers = {name: _writers(graph, name) for name in graph.layers}
    layers = {}
    for name in graph.layers:
        module = graph.module.get_submodule(name)
        found: dict[str, Any] = {"writers": writers[name], "weight": _weight(module, bits)}
        if name in seen:
            found["input"] = _input(*seen[name])
        layers[name] = found
    return {
        "format": FORMAT,
        "version": 1,
        "images": 0 if shown is None else count(shown),
        "layers": layers,
        "pairs": pairs,
    }


def _pairs(
    graph: QuantGraph, images: Inputs, policy: Policy, seen: dict[str, tuple[Tensor, Tensor]]
) -> list[dict[str, Any]]:
    """What rescaling the channels between two layers would bring (`mpq.ptq.equalize`).

    The same pass fills `seen` with the least and the largest value `[C]` of each channel of what
    every layer reads.
    """

    def look_at(name: str) -> Look:
        def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = LayerOp.of(module).by_channel(args[0])
            low, high = (t.float().cpu() for t in torch.aminmax(rows, dim=1))
            if name in seen:
                low, high = torch.minimum(low, seen[name][0]), torch.maximum(high, seen[name][1])
            seen[name] = (low, high)

        return look

    looks = [(name, look_at(name)) for name in graph.layers]
    found = equalize(graph.copy(), images, policy, mode="on", looks=looks)
    return [{"first": p.first, "second": p.second, "gain": p.gain} for p in found if not p.reason]


def _writers(graph: QuantGraph, layer: str) -> list[str]:
    """The layers from which what a layer reads comes, through whatever lies between."""
    start = [n for n in graph.module.graph.nodes if n.op == "call_module" and n.target == layer]
    found: list[str] = []
    done: set[fx.Node] = set()
    todo = [source for node in start for source in node.all_input_nodes]
    while todo:
        node = todo.pop()
        if node in done:
            continue
        done.add(node)
        if node.op == "call_module" and node.target in graph.layers:
            found.append(str(node.target))
        else:
            todo += node.all_input_nodes
    return sorted(set(found))


def _input(low: Tensor, high: Tensor) -> dict[str, Any]:
    """What a layer reads: its range, which channels stretch it, and which are always zero."""
    extents = high.clamp(min=0) - low.clamp(max=0)
    apart, ratio = _apart(extents)
    rest = torch.ones(len(extents), dtype=torch.bool)
    rest[apart] = False
    whole, without = (
        float(high[kept].amax().clamp(min=0) - low[kept].amin().clamp(max=0))
        for kept in (torch.ones_like(rest), rest)
    )
    return {
        "channels": len(extents),
        "dead": int((extents == 0).sum()),
        "low": float(low.amin()),
        "high": float(high.amax()),
        "apart": apart,
        "ratio": ratio,
        "without": without,
        "share": 1 - (without / whole) ** 2 if whole > 0 else 0.0,
    }


def _weight(module: nn.Module, bits: Sequence[int]) -> dict[str, Any]:
    """The weights of a layer: which input channels or single weights set the scales of all."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    rows = weight.detach().float().cpu().transpose(0, LayerOp.of(module).axis)
    peaks = rows.flatten(1).abs().amax(1)
    alive = (peaks > DEAD * peaks.amax()).nonzero().flatten()
    found: dict[str, Any] = {"rows": len(peaks), "dead": len(peaks) - len(alive)}
    found["values"] = rows[0].numel()
    if not len(alive):
        return found
    low, high = torch.quantile(peaks[alive], torch.tensor([0.05, 0.95])).tolist()
    found["spread"] = high / low
    picked = alive[:: max(1, rows.numel() // SAMPLE)]
    return found | _outliers(rows[picked], picked, [b for b in bits if b <= 8])


def _outliers(rows: Tensor, picked: Tensor, bits: Sequence[int]) -> dict[str, Any]:
    """Which channels, and which weights, of some rows `[R, I, ...]` stretch their scales."""
    inputs = rows.abs() if rows.ndim == 2 else rows.flatten(2).abs().amax(2)
    middle = inputs.median(1, keepdim=True).values
    apart, ratio = _apart((inputs / middle.clamp(min=1e-30)).median(0).values)
    channels = torch.zeros_like(rows, dtype=torch.bool)
    channels[:, apart] = True
    flat = rows.flatten(1).abs()
    largest = flat.topk(max(1, flat.shape[1] // VALUES), 1).indices
    single = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, largest, True).view_as(rows)
    whole = {b: _cause(rows, channels, b) for b in bits if apart}
    alone = {b: _cause(rows, single, b) for b in bits}
    return {
        "apart": apart,
        "ratio": ratio,
        "channel": {str(b): {"share": one.share, "part": one.part} for b, one in whole.items()},
        "single": {
            str(b): {"share": one.share, "part": one.part, "row": int(picked[one.row])}
            for b, one in alone.items()
        },
    }


def _apart(extents: Tensor) -> tuple[list[int], float]:
    """The few channels that stand furthest apart, and how many times the next one they reach."""
    if len(extents) < FEWEST:
        return [], 1.0
    values, order = extents.sort(descending=True)
    few = max(1, len(extents) // FEW)
    above, below = values[:few], values[1 : few + 1]
    ratios = torch.where(below > 0, above / below.clamp(min=1e-30), 1.0)
    last = int(ratios.argmax())
    return order[: last + 1].tolist(), float(ratios[last])


@dataclass(frozen=True, slots=True)
class _Cause:
    """What outliers do to rows of weights: see `share` and `part` above, and the worst row."""

    share: float
    part: float
    row: int


def _cause(rows: Tensor, outside: Tensor, bits: int) -> _Cause:
    """What the weights `outside` do to the others of their rows at a width."""
    spec = weight_spec(bits)

    def errors(scale: Tensor) -> Tensor:
        return (fake_quantize(rows, scale, torch.zeros_like(scale), spec, 0) - rows).square()

    now = errors(weight_scales(rows, spec))
    then = errors(weight_scales(rows.masked_fill(outside, 0.0), spec)).masked_fill(outside, 0.0)
    rest = now.masked_fill(outside, 0.0)
    saved = (rest - then).flatten(1).sum(1)
    total, of_rest = float(now.sum()), float(rest.sum())
    return _Cause(
        share=float(saved.sum()) / of_rest if of_rest > 0 else 0.0,
        part=max(float(saved.sum()) / total, 0.0) if total > 0 else 0.0,
        row=int(saved.argmax()),
    )
