"""Fold batch normalization into the layer before it.

For a layer with weight `W`, bias `b` and a following BN with `gamma, beta, mean, var, eps`:
`W' = W gamma / sqrt(var + eps)` per output channel and
`b' = (b - mean) gamma / sqrt(var + eps) + beta` (Jacob et al. 2018, section 3.2). Folded in
float64, stored in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from mpq.graph.ir import QuantGraph
from mpq.graph.kinds import kind_of
from mpq.graph.shapes import ranks
from mpq.numerics import per_axis
from mpq.quant.layer import LayerOp


def fold_bn(qg: QuantGraph) -> int:
    """Fold each BN whose input is a layer with no other reader; return how many."""
    modules = dict(qg.module.named_modules())
    count = 0
    for node in list(qg.module.graph.nodes):
        if kind_of(node, modules) != "batch_norm":
            continue
        before = node.args[0]
        if kind_of(before, modules) != "layer" or len(before.users) != 1:
            continue
        bn, layer = modules[str(node.target)], modules[str(before.target)]
        assert isinstance(bn, nn.modules.batchnorm._BatchNorm)
        if bn.running_mean is None:
            continue  # no statistics: it normalizes by the batch and cannot be folded
        if isinstance(layer, nn.Linear) and ranks(qg)[before.name] != 2:
            continue  # it normalizes dimension 1, which is not the layer's output
        _fold(layer, bn)
        node.replace_all_uses_with(before)
        qg.module.graph.erase_node(node)
        count += 1
    _drop_unused(qg.module)
    return count


def _fold(layer: nn.Module, bn: nn.modules.batchnorm._BatchNorm) -> None:
    mean, var = bn.running_mean, bn.running_var
    assert mean is not None
    assert var is not None
    gamma = torch.ones_like(mean) if bn.weight is None else bn.weight.detach()
    beta = torch.zeros_like(mean) if bn.bias is None else bn.bias.detach()
    factor = gamma.double() / (var.double() + bn.eps).sqrt()
    weight: Tensor = layer.weight.detach()  # type: ignore[union-attr,operator,assignment]
    bias: Tensor = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach()  # type: ignore[union-attr,operator,assignment]
    folded = _scale_outputs(weight.double(), factor, LayerOp.of(layer))
    layer.weight = nn.Parameter(folded.to(weight.dtype))
    layer.bias = nn.Parameter(((bias.double() - mean) * factor + beta).to(weight.dtype))


def _scale_outputs(weight: Tensor, factor: Tensor, op: LayerOp) -> Tensor:
    """Multiply the weights of output channel `c` by `factor[c]`."""
    if op.kind != "conv_transpose":
        return weight * per_axis(factor, weight.ndim)
    # [I, O / groups, *K]: output channel c lies in group c // (O / groups).
    grouped = weight.reshape(op.groups, -1, *weight.shape[1:])
    factors = factor.reshape(op.groups, 1, -1, *[1] * (weight.ndim - 2))
    return (grouped * factors).reshape(weight.shape)


def _drop_unused(module: fx.GraphModule) -> None:
    """Remove the folded modules, so that no state of theirs stays in the state dict."""
    module.recompile()
    module.delete_all_unused_submodules()
