"""What a graph node does, in the words of the target's table: the one place that knows op names."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from mpq.quant.operation import LAYERS, refusal
from mpq.target import MOVING_OPS

MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.MaxPool1d: "maxpool",
    nn.MaxPool2d: "maxpool",
    nn.AvgPool1d: "avgpool",
    nn.AvgPool2d: "avgpool",
    nn.Flatten: "flatten",
    nn.Sigmoid: "sigmoid",
    nn.Hardsigmoid: "hardsigmoid",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Dropout: "identity",
    nn.Dropout1d: "identity",
    nn.Dropout2d: "identity",
    nn.Dropout3d: "identity",
    nn.Identity: "identity",
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.CircularPad1d, nn.CircularPad2d), "pad"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d), "pad"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d), "pad"),
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
}

FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.relu6: "relu6",
    operator.add: "add",
    torch.add: "add",
    operator.mul: "mul",
    torch.mul: "mul",
    torch.cat: "concat",
    torch.concat: "concat",
    F.max_pool1d: "maxpool",
    F.max_pool2d: "maxpool",
    torch.max_pool2d: "maxpool",
    F.avg_pool1d: "avgpool",
    F.avg_pool2d: "avgpool",
    F.adaptive_avg_pool2d: "adaptive_avgpool",
    torch.mean: "mean",
    torch.flatten: "flatten",
    torch.reshape: "flatten",
    torch.squeeze: "flatten",
    torch.unsqueeze: "flatten",
    torch.transpose: "transpose",
    torch.permute: "transpose",
    torch.chunk: "split",
    torch.split: "split",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid",
    F.silu: "silu",
    F.hardswish: "hardswish",
    F.pad: "pad",
    operator.getitem: "slice",
    getattr: "shape",
    F.dropout: "identity",
}

METHODS: dict[str, str] = {
    "relu": "relu",
    "add": "add",
    "mul": "mul",
    "mean": "mean",
    "flatten": "flatten",
    "view": "flatten",
    "reshape": "flatten",
    "squeeze": "flatten",
    "unsqueeze": "flatten",
    "transpose": "transpose",
    "permute": "transpose",
    "chunk": "split",
    "split": "split",
    "sigmoid": "sigmoid",
    "contiguous": "flatten",
    "size": "shape",
    "dim": "shape",
}


def kind_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """The kind of a node; `other` for what has no name here, `layer` for quantizable layers."""
    if node.op in ("placeholder", "output", "get_attr"):
        return node.op
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) in LAYERS:
            return "layer" if refusal(module) is None else "other"
        if type(module) is nn.AdaptiveAvgPool2d:
            return "global_avgpool" if module.output_size in (1, (1, 1)) else "adaptive_avgpool"
        return MODULES.get(type(module), "other")
    if node.op == "call_method":
        return METHODS.get(str(node.target), "other")
    assert callable(node.target)
    kind = FUNCTIONS.get(node.target, "other")
    if kind == "shape" and node.args[1] not in ("shape", "ndim", "dtype", "device"):
        return "other"  # x.T and the like are values
    if kind == "other" and getattr(node.target, "__name__", "") == "stochastic_depth":
        return "identity"  # torchvision's: the identity in eval mode
    return kind


def moves(node: fx.Node, kinds: Mapping[fx.Node, str]) -> bool:
    """Whether a node only moves or selects values of its first input, given the kinds of all."""
    kind = kinds[node]
    if kind not in MOVING_OPS or not isinstance(node.args[0], fx.Node):
        return False
    if kind == "slice":
        # x[..., ::2] selects values; x[0] does so only where x is what a split returned. No
        # runtime gathers integers by a list of indices.
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        if any(isinstance(i, (list, fx.Node)) for i in index):
            return False
        return not isinstance(node.args[1], (int, str)) or kinds[node.args[0]] == "split"
    if kind == "pad":
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        if value == -math.inf:  # what no maximum ever is
            return all(kinds.get(user) == "maxpool" for user in node.users)
        return value in (None, 0, 0.0)
    return True
