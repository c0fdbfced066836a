"""Batch normalization in training: put it back after the layers it was folded into, and absorb it.

    prepared (and calibrated) -> attach_norms -> train -> absorb_norms -> prepared

Neither step changes what the graph answers in eval mode. Between them the layers train as they did
in float, normalized by the batch; see `mpq.quant.norm` for why the integers do not mind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpq.calls import Inputs, call, count, split
from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.hooks import hooked
from mpq.quant.layer import QuantLayer
from mpq.quant.norm import LiveNorm, unfold_norm


@torch.no_grad()
def attach_norms(qg: QuantGraph, images: Inputs, *, batch: int = 128) -> int:
    """Give a norm to every quantized layer that had one, in place; return how many.

    Its statistics are those of the quantized network on `images`, so that training begins where
    eval mode stands. Layers with one step for all channels, and transposed convolutions in groups,
    keep their bias: their scales do not belong to output channels.

    Args:
        qg: a graph in stage `prepared`, calibrated.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`).
        batch: images at a time.

    Raises:
        GraphError: the graph is not prepared.
        UsageError: no images.
    """
    qg.require("prepared")
    if not count(images):
        raise UsageError("norms need at least one image to start from. Got none.")
    qg.module.eval()
    seen = [(_OutputStatistics(layer), factor) for layer, factor in _normalizable(qg)]
    with hooked(one.layer.register_forward_hook(one.hook) for one, _ in seen):
        for part in split(images, batch):
            call(qg.module, part)
    called = [(one, factor) for one, factor in seen if one.count]
    for one, factor in called:
        _attach(one.layer, one.mean(), one.var(), factor)
    return len(called)


def absorb_norms(qg: QuantGraph) -> int:
    """Take every live norm into its layer's steps and bias, in place; return how many."""
    layers = [m for m in qg.module.modules() if isinstance(m, QuantLayer) and m.norm is not None]
    for layer in layers:
        layer.absorb_norm()
    return len(layers)


def freeze_norms(module: nn.Module, frozen: bool) -> None:
    """Let live norms use their running statistics in training too, or the batch's again."""
    for norm in module.modules():
        if isinstance(norm, LiveNorm):
            norm.frozen = frozen


def _normalizable(qg: QuantGraph) -> Iterator[tuple[QuantLayer, Tensor]]:
    """Layers that a norm was folded into, with the factor of each channel."""
    modules = dict(qg.module.named_modules())
    for name, factor in qg.folded.items():
        layer = modules.get(name)
        if not isinstance(layer, QuantLayer) or layer.norm is not None:
            continue
        per_output = layer.op.kind != "conv_transpose" or layer.op.groups == 1
        if layer.spec.granularity == "channel" and per_output:
            yield layer, factor


def _attach(layer: QuantLayer, mean: Tensor, var: Tensor, factor: Tensor) -> None:
    assert layer.bias is not None
    divisor, norm = unfold_norm(mean, var, layer.bias.detach(), factor)
    shape = [1] * layer.weight.ndim
    shape[layer.op.axis] = -1
    layer.weight.div_(divisor.reshape(shape))
    layer.bias, layer.norm = None, norm.train(layer.training)
    layer.set_scale(layer.scale / divisor)


class _OutputStatistics:
    """Mean and variance of a layer's output per channel, in float64."""

    def __init__(self, layer: QuantLayer) -> None:
        self.layer, self.count = layer, 0
        self.total = self.squares = torch.zeros(())

    def hook(self, module: nn.Module, args: object, out: Tensor) -> None:
        rows = self.layer.op.by_channel(out).double()
        self.total = self.total + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)
        self.count += rows.shape[1]

    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    def var(self) -> Tensor:
        return (self.squares / self.count - (self.total / self.count) ** 2).clamp(min=0).float()
