"""Cross-layer equalization: rescale channels between two layers so that both quantize better.

Channel `c` of the tensor between two layers is multiplied by `f_c`, the weights that write it
alike, those that read it by `1 / f_c`; the network stays the same function (`pairs`). Nagel et al.,
"Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.1, set
`1 / f_c = sqrt(r1_c r2_c) / r2_c` with the ranges of the channel in both weights. Here weights have
a scale per output channel, to which the rows of the first layer do not matter, so `r1` is the range
of the channel's activation, measured on images. The exponent 1/2 is one of several: `1 / f_c =
r1_c^a / r2_c^(1 - a)` is tried for `a` from 0 (all for the weights) to 1 (all for the activation)
and chosen by the noise that is to be expected of both roundings at the widths of the policy,
`step^2 / 12` each.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpq.calls import Inputs, call, split, take
from mpq.errors import UsageError
from mpq.graph.fold_bn import scale_outputs
from mpq.graph.ir import QuantGraph
from mpq.hooks import hooked
from mpq.layers import LayerChoice
from mpq.policy import Policy
from mpq.ptq.pairs import Link, links
from mpq.quant.layer import float_layer
from mpq.quant.operation import LayerOp

logger = logging.getLogger(__name__)
Equalize = Literal["auto", "on", "off"]
EQUALIZE: tuple[str, ...] = get_args(Equalize)
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORTH = 0.5
"""What is left of the expected noise at most, for `auto` to rescale a pair."""
REACH = 1024.0
"""Largest factor between two channels: beyond, a channel counts as dead."""
IMAGES = 128
Look = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""A forward pre-hook."""


@dataclass(frozen=True)
class Pair:
    """What became of one pair of layers.

    Args:
        first: the layer that writes the channels.
        second: the one that reads them.
        gain: expected noise before over after; 1 where nothing was changed.
        reason: why nothing was changed, or an empty string.
    """

    first: str
    second: str
    gain: float
    reason: str = ""


@torch.no_grad()
def equalize(
    qg: QuantGraph,
    images: Inputs,
    policy: Policy,
    *,
    mode: Equalize = "auto",
    looks: Sequence[tuple[str, Look]] = (),
) -> list[Pair]:
    """Rescale the channels between layers of a float graph, in place.

    Args:
        qg: a graph in stage `float`.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`); 128 of them are looked at.
        policy: the widths to come.
        mode: `auto` rescales a pair where half or more of its expected noise goes, `on` where any
            does, `off` none.
        looks: who else sees the inputs of modules, by path, in the one pass over the images.

    Returns:
        A record for each pair.

    Raises:
        UsageError: an unknown mode.
    """
    if mode not in EQUALIZE:
        raise UsageError(f"equalize must be one of {', '.join(EQUALIZE)}. Got {mode!r} instead.")
    if mode == "off":
        return []
    choices = policy.resolve(list(qg.layers))
    chains = links(qg)
    seen = _Inputs(qg, [link for link in chains if not link.reason])
    seen.run(take(images, slice(IMAGES)), looks)
    worth = WORTH if mode == "auto" else 1.0
    found = [_treat(qg, link, seen, choices[link.second], worth) for link in chains]
    for pair in found:
        logger.info("%s -> %s: %s", pair.first, pair.second, pair.reason or f"{pair.gain:.1f}x")
    return found


class _Inputs:
    """Range of each channel between the layers of a link, and mean square where it is read.

    What a LeakyReLU or PReLU reads is stored as well: there the range is that of both.
    """

    def __init__(self, qg: QuantGraph, chains: list[Link]) -> None:
        self.qg, self.chains = qg, chains
        self.high: dict[str, Tensor] = {}
        self.low: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.values: dict[str, int] = {}

    def run(self, images: Inputs, looks: Sequence[tuple[str, Look]]) -> None:
        """Look at every batch, where anybody does."""
        if not (self.chains or looks):
            return
        module = self.qg.module
        others = (module.get_submodule(n).register_forward_pre_hook(look) for n, look in looks)
        with hooked(others), hooked(h for link in self.chains for h in self._hooks(link)):
            for part in split(images, self.qg.batch(32)):
                call(module, part)

    def _hooks(self, link: Link) -> Iterator[RemovableHandle]:
        first, second = (self.qg.module.get_submodule(n) for n in (link.first, link.second))
        name, channels = link.second, len(link.limit)
        zero = torch.zeros(channels)

        def ranged(layer: nn.Module, x: Tensor) -> Tensor:
            rows = LayerOp.of(layer).by_channel(x).reshape(channels, -1)
            self.high[name] = torch.maximum(self.high.get(name, zero), rows.amax(1))
            self.low[name] = torch.minimum(self.low.get(name, zero), rows.amin(1))
            return rows

        def write(module: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> None:
            ranged(module, x)

        def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = ranged(module, args[0])
            self.squares[name] = self.squares.get(name, zero) + rows.square().sum(1)
            self.values[name] = self.values.get(name, 0) + rows.shape[1]

        yield second.register_forward_pre_hook(read)
        if link.leaky:
            yield first.register_forward_hook(write)


def _treat(qg: QuantGraph, link: Link, seen: _Inputs, choice: LayerChoice, worth: float) -> Pair:
    """Rescale one pair if that pays."""
    if link.reason:
        return Pair(link.first, link.second, 1.0, link.reason)
    layer = float_layer(qg.module.get_submodule(link.second))
    op, weight = LayerOp.of(layer), layer.weight.detach()
    high, low = seen.high[link.second], seen.low[link.second]
    ranges = torch.maximum(high, -low)
    columns = _columns(op, weight, len(ranges))
    power = seen.squares[link.second] / seen.values[link.second]

    def noise(factor: Tensor) -> float:
        span = float((high * factor).max() - (low * factor).min())
        return _noise(columns, factor, span, power, choice)

    plain = noise(torch.ones_like(ranges))
    tried = [_factors(ranges, columns, exponent, link.limit) for exponent in EXPONENTS]
    costs = [noise(factor) for factor in tried]
    best = min(range(len(costs)), key=costs.__getitem__)
    if not plain or not costs[best] < worth * plain:
        return Pair(link.first, link.second, 1.0, "its ranges are even enough")
    _apply(qg, link, tried[best])
    return Pair(link.first, link.second, plain / max(costs[best], 1e-30))


def _factors(ranges: Tensor, columns: Tensor, exponent: float, limit: Tensor) -> Tensor:
    """`[C]` factors that keep the widest channel's range where no limit keeps them lower."""
    reading = columns.abs().amax((0, 2))
    alive = (ranges > 0) & (reading > 0)
    wish = torch.where(alive, reading ** (1 - exponent) / ranges**exponent, 1.0)
    if not bool(alive.any()):
        return torch.ones_like(ranges)
    # The widest channel after rescaling is as wide as the widest was before.
    wish = wish * ranges.max() / (wish * ranges)[alive].max()
    wish = wish.clamp(1 / REACH, REACH).minimum(limit)
    return torch.where(alive & (limit > 1), wish, 1.0)


def _noise(
    columns: Tensor, factor: Tensor, span: float, power: Tensor, choice: LayerChoice
) -> float:
    """Expected square of the second layer's output noise, per position."""
    read = columns / factor[:, None]
    total = 0.0
    if choice.activation is not None:
        step = span / (choice.activation.qmax - choice.activation.qmin)
        total += step**2 / 12 * float(read.square().sum())
    if choice.weight is not None:
        steps = read.abs().amax((1, 2)) / choice.weight.qmax
        if choice.weight.granularity == "tensor":
            steps = steps.amax().expand_as(steps)
        met = (read != 0).float() * (power * factor.square())[:, None]
        total += float((steps.square() / 12 * met.sum((1, 2))).sum())
    return total


def _columns(op: LayerOp, weight: Tensor, channels: int) -> Tensor:
    """Weights as `[O, C, K]` by the channel that they read, 0 where an output reads none of it."""
    if op.kind == "linear":
        return weight.reshape(weight.shape[0], channels, -1)
    if op.kind == "conv_transpose":
        return weight.flatten(1).reshape(channels, -1, 1).transpose(0, 1)
    groups = weight.reshape(op.groups, weight.shape[0] // op.groups, -1)
    spread: Tensor = torch.block_diag(*groups)
    return spread.reshape(weight.shape[0], channels, -1)


def _apply(qg: QuantGraph, link: Link, factor: Tensor) -> None:
    """Multiply what writes each channel, divide what reads it."""
    first, second = (float_layer(qg.module.get_submodule(n)) for n in (link.first, link.second))
    written, read = first.weight.detach(), second.weight.detach()
    first.weight = nn.Parameter(scale_outputs(written, factor, LayerOp.of(first)))
    if first.bias is not None:
        first.bias = nn.Parameter(first.bias.detach() * factor)
    second.weight = nn.Parameter(_scale_inputs(read, 1 / factor, LayerOp.of(second)))


def _scale_inputs(weight: Tensor, factor: Tensor, op: LayerOp) -> Tensor:
    """Multiply the weights that read channel `c` by `factor[c]`."""
    if op.kind == "linear":
        repeated = factor.repeat_interleave(weight.shape[1] // len(factor))
        return weight * repeated
    if op.kind == "conv_transpose":
        return weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    # [O, I / groups, *K]: output channel o reads the channels of its group.
    read = factor.reshape(op.groups, 1, -1).expand(-1, weight.shape[0] // op.groups, -1)
    return weight * read.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
