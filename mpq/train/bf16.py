"""bf16 without its slow spot on a CPU: strided depthwise convolutions stay in float32.

oneDNN's gradient for the input of such a layer takes ten times as long in bf16 as in float32
(torch 2.13, Zen 4): three layers were 40 % of a step of MobileNetV2.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only


def autocast(device: str, *, enabled: bool) -> ExitStack:
    """A context whose forward passes compute in bf16, where that is fast on `device`."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device, torch.bfloat16, enabled=enabled))
    if enabled and device == "cpu":
        stack.enter_context(_StridedDepthwise())
    return stack


class _StridedDepthwise(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.conv2d or not _slow(*args, **kwargs):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
            return func(*args, **kwargs).to(torch.bfloat16)


def _slow(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, *more: Any, **named: Any
) -> bool:
    groups = more[2] if len(more) > 2 else named.get("groups", 1)
    strided = stride not in (1, (1, 1), [1, 1])
    return strided and groups == input.shape[1] > 1 and torch.is_grad_enabled()
