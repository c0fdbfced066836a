"""Fold batch normalization into the layer before it, or make it a layer of its own.

For a layer with weight `W`, bias `b` and a following BN with `gamma, beta, mean, var, eps`:
`W' = W gamma / sqrt(var + eps)` per output channel and
`b' = (b - mean) gamma / sqrt(var + eps) + beta` (Jacob et al. 2018, section 3.2). Folded in
float64, stored in float32.

A BN of images that cannot be folded (before the activation, after a concatenation or an addition)
is a depthwise convolution with a 1x1 kernel: that has an integer kernel, takes the ReLU after it
along, and with one weight and one scale per channel its weights are exact at any width.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.shapes import ranks
from mpq.numerics import per_axis
from mpq.quant.layer import FloatLayer, float_layer
from mpq.quant.operation import LayerOp


def fold_bn(qg: QuantGraph) -> int:
    """Fold each BN whose input is a layer with no other reader, replace others; return how many."""
    modules = dict(qg.module.named_modules())
    count = 0
    for node in list(qg.module.graph.nodes):
        if kind_of(node, modules) != "batch_norm":
            continue
        before = node.args[0]
        bn = modules[str(node.target)]
        assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
        if bn.running_mean is None:
            continue  # no statistics: it normalizes by the batch and cannot be folded
        if not _foldable(qg, before, modules):
            if isinstance(bn, nn.BatchNorm2d):
                layer, factor = _as_depthwise(bn)
                qg.module.set_submodule(str(node.target), layer)
                qg.folded[str(node.target)] = factor
                count += 1
            continue
        name = str(before.target)
        factor = _fold(float_layer(modules[name]), bn)
        qg.folded[name] = qg.folded[name] * factor if name in qg.folded else factor
        node.replace_all_uses_with(before)
        qg.module.graph.erase_node(node)
        count += 1
    qg.module.recompile()
    qg.module.delete_all_unused_submodules()  # no state of a folded norm stays
    return count


def _foldable(qg: QuantGraph, before: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if kind_of(before, modules) != "layer" or len(before.users) != 1:
        return False
    # After a matrix product of sequences it normalizes dimension 1, which is not the output.
    linear = isinstance(modules[str(before.target)], nn.Linear)
    return not linear or ranks(qg)[before.name] == 2


def _as_depthwise(bn: nn.BatchNorm2d) -> tuple[nn.Conv2d, Tensor]:
    """The layer that it is, and the factor of each channel."""
    channels = bn.num_features
    layer = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device="meta")
    assert bn.running_mean is not None
    layer.weight = nn.Parameter(torch.ones(channels, 1, 1, 1, device=bn.running_mean.device))
    return layer, _fold(layer, bn)


def _fold(layer: FloatLayer, bn: nn.modules.batchnorm._BatchNorm) -> Tensor:
    """Fold in place; return what each output channel was multiplied by."""
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    assert var is not None
    gamma = torch.ones_like(mean) if bn.weight is None else bn.weight.detach()
    beta = torch.zeros_like(mean) if bn.bias is None else bn.bias.detach()
    factor = gamma.double() / (var.double() + bn.eps).sqrt()
    weight = layer.weight.detach()
    bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach()
    folded = scale_outputs(weight.double(), factor, LayerOp.of(layer))
    layer.weight = nn.Parameter(folded.to(weight.dtype))
    layer.bias = nn.Parameter(((bias.double() - mean) * factor + beta).to(weight.dtype))
    return factor.to(weight.dtype)


def scale_outputs(weight: Tensor, factor: Tensor, op: LayerOp) -> Tensor:
    """Multiply the weights of output channel `c` by `factor[c]`."""
    if op.kind != "conv_transpose":
        return weight * per_axis(factor, weight.ndim)
    # [I, O / groups, *K]: output channel c lies in group c // (O / groups).
    grouped = weight.reshape(op.groups, -1, *weight.shape[1:])
    factors = factor.reshape(op.groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * factors).reshape(weight.shape)
