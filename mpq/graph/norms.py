"""Batch normalization in training: put it back behind the layers it was folded into, and absorb it.

    prepared (and calibrated) -> attach_norms -> train -> absorb_norms -> prepared

Neither step changes what the graph answers in eval mode. Between them the layers train as they did
in float, normalized by the batch; see `mpq.quant.norm` for why the integers do not mind.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mpq.errors import UsageError
from mpq.graph.ir import QuantGraph
from mpq.quant.layer import QuantLayer
from mpq.quant.norm import LiveNorm, behind


@torch.no_grad()
def attach_norms(qg: QuantGraph, images: Tensor, *, batch: int = 128) -> int:
    """Give a norm to every quantized layer that had one, in place; return how many.

    Its statistics are those of the quantized network on `images`, so that training begins where
    eval mode stands. Layers with one step for all channels, and transposed convolutions in groups,
    keep their bias: their scales do not belong to output channels.

    Args:
        qg: a graph in stage `prepared`, calibrated.
        images: normalized `[N, C, H, W]`.
        batch: images at a time.

    Raises:
        GraphError: the graph is not prepared.
        UsageError: no images.
    """
    qg.require("prepared")
    if len(images) == 0:
        raise UsageError("norms need at least one image to start from. Got none.")
    qg.module.eval()
    layers = list(_normalizable(qg.module))
    moments = [_Moments(layer) for layer in layers]
    handles = [m.layer.register_forward_hook(m.hook) for m in moments]
    try:
        for part in torch.split(images, batch):
            qg.module(part)
    finally:
        for handle in handles:
            handle.remove()
    for m in moments:
        if m.count:
            _attach(m.layer, m.mean(), m.var())
    return sum(m.count > 0 for m in moments)


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


def _normalizable(module: nn.Module) -> Iterator[QuantLayer]:
    for layer in module.modules():
        if not isinstance(layer, QuantLayer) or layer.folded is None or layer.norm is not None:
            continue
        per_output = layer.op.kind != "conv_transpose" or layer.op.groups == 1
        if layer.spec.granularity == "channel" and per_output:
            yield layer


def _attach(layer: QuantLayer, mean: Tensor, var: Tensor) -> None:
    assert layer.bias is not None
    assert layer.folded is not None
    divisor, norm = behind(mean, var, layer.bias.detach(), layer.folded)
    shape = [1] * layer.weight.ndim
    shape[layer.op.axis] = -1
    layer.weight.div_(divisor.reshape(shape))
    layer.scale.div_(divisor)
    layer.bias, layer.norm = None, norm.train(layer.training)


class _Moments:
    """Mean and variance of a layer's output per channel, in float64."""

    def __init__(self, layer: QuantLayer) -> None:
        self.layer, self.count = layer, 0
        self.total = self.squares = torch.zeros(())

    def hook(self, module: nn.Module, args: object, out: Tensor) -> None:
        axis = out.ndim - 1 if self.layer.op.kind == "linear" else 1
        rows = out.transpose(0, axis).flatten(1).double()
        self.total = self.total + rows.sum(1)
        self.squares = self.squares + rows.square().sum(1)
        self.count += rows.shape[1]

    def mean(self) -> Tensor:
        return (self.total / self.count).float()

    def var(self) -> Tensor:
        return (self.squares / self.count - (self.total / self.count) ** 2).clamp(min=0).float()
