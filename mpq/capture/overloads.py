"""An exported program speaks of `torch.ops.aten`: the Python names of the same calls.

Recording runs the program and sees its overloads; where a call has a Python function of the same
meaning, that is what enters the graph, so that nothing later knows where a graph came from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

aten = torch.ops.aten

_SAME: dict[Any, Callable[..., Any]] = {
    aten.conv1d.default: F.conv1d,
    aten.conv2d.default: F.conv2d,
    aten.conv3d.default: F.conv3d,
    aten.conv1d.padding: F.conv1d,
    aten.conv2d.padding: F.conv2d,
    aten.conv3d.padding: F.conv3d,
    aten.conv_transpose1d.default: F.conv_transpose1d,
    aten.conv_transpose2d.input: F.conv_transpose2d,
    aten.linear.default: F.linear,
    aten.relu.default: F.relu,
    aten.relu_.default: F.relu,
    aten.sigmoid.default: torch.sigmoid,
    aten.silu.default: F.silu,
    aten.silu_.default: F.silu,
    aten.hardswish.default: F.hardswish,
    aten.hardswish_.default: F.hardswish,
    aten.hardsigmoid.default: F.hardsigmoid,
    aten.gelu.default: F.gelu,
    aten.softmax.int: torch.softmax,
    aten.max_pool1d.default: F.max_pool1d,
    aten.max_pool2d.default: F.max_pool2d,
    aten.avg_pool1d.default: F.avg_pool1d,
    aten.avg_pool2d.default: F.avg_pool2d,
    aten.adaptive_avg_pool2d.default: F.adaptive_avg_pool2d,
    aten.flatten.using_ints: torch.flatten,
    aten.view.default: torch.reshape,
    aten.reshape.default: torch.reshape,
    aten.squeeze.dim: torch.squeeze,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.transpose.int: torch.transpose,
    aten.permute.default: torch.permute,
    aten.mean.dim: torch.mean,
    aten.cat.default: torch.cat,
    aten.chunk.default: torch.chunk,
    aten.split.Tensor: torch.split,
    aten.split_with_sizes.default: torch.split,
    aten.pad.default: F.pad,
    aten.matmul.default: torch.matmul,
}
_OPERATORS: dict[Any, Callable[..., Any]] = {
    getattr(aten, name + suffix).Tensor: function
    for name, function in (
        ("add", operator.add),
        ("sub", operator.sub),
        ("mul", operator.mul),
        ("div", operator.truediv),
    )
    for suffix in ("", "_")
}
_EVERYTHING = 2**63 - 1
"""The end of a slice that has none."""

Named = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def in_python(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Named:
    """Function, arguments and keywords of a call, by its Python name where it has one."""
    if function in _SAME:
        return _SAME[function], args, kwargs
    if function in _OPERATORS and not kwargs:
        return _OPERATORS[function], args, {}
    if function is aten.batch_norm.default:
        x, weight, bias, mean, var, training, momentum, eps = args[:8]
        return F.batch_norm, (x, mean, var, weight, bias, training, momentum, eps), {}
    if function is aten.layer_norm.default:
        return F.layer_norm, args[:5], kwargs
    if function in (aten.hardtanh.default, aten.hardtanh_.default) and args[1:] == (0.0, 6.0):
        return F.relu6, args[:1], {}
    if function in (aten.dropout.default, aten.dropout_.default) and not args[2]:
        return F.dropout, args, {}
    if function is aten.select.int and args[1] >= 0:
        return operator.getitem, (args[0], _along(args[1], args[2])), {}
    if function is aten.slice.Tensor and (len(args) < 2 or args[1] >= 0):
        defaults: list[Any] = [None, 0, None, None, 1]
        _, dim, start, end, step = [*args, *defaults[len(args) :]]
        end = None if isinstance(end, int) and end == _EVERYTHING else end
        return operator.getitem, (args[0], _along(dim, slice(start, end, step))), {}
    return function, args, kwargs


def _along(dim: int, index: Any) -> tuple[Any, ...]:
    return (*(slice(None),) * dim, index)
