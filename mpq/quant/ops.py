"""The operators of a frozen graph, as torch custom ops: training promises, export translates.

`mpq::fake_quantize` is QuantizeLinear followed by DequantizeLinear. `mpq::conv` and `mpq::linear`
multiply integers: the input lies on the grid of its quantizer, so `x / s_x` are integers; the
accumulator is their sum with the integer weights plus an integer bias of scale `s_x * s_w`, as in
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", 2018. The sums are kept in float32, which is exact up to 2^24: more than trained layers
reach, and beyond it the error is one part in 2^24, that of any float32 result.
`mpq::dynamic_linear` is a matrix product whose input is rounded to a grid of its own range, as
ONNX's DynamicQuantizeLinear does it: one scale and zero point for the whole tensor, batch included.
`mpq::dequantize` expands stored weights of a layer that runs in float.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.numerics import choose_qparams, per_axis, quantize
from mpq.spec import DYNAMIC


def _fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """`x` rounded to the grid of a per-tensor quantizer; scale and zero point have shape `[]`."""
    z = zero_point.to(x.dtype)
    return ((x / scale).round_().add_(z).clamp_(qmin, qmax)).sub_(z).mul_(scale)


def _dequantize(weight: Tensor, scale: Tensor, axis: int) -> Tensor:
    """Float weights of integer `weight`, one scale per slice of `axis`."""
    return weight.to(scale.dtype) * per_axis(scale, weight.ndim, axis)


def _requantize(acc: Tensor, bias: Tensor | None, scale: Tensor, channel_dim: int) -> Tensor:
    """`(acc + bias) * scale` with per-channel bias and scale along `channel_dim`; changes `acc`."""
    if bias is not None:
        acc.add_(per_axis(bias.to(acc.dtype), acc.ndim, channel_dim))
    by = per_axis(scale, acc.ndim, channel_dim)
    return acc.mul_(by) if acc.dtype == by.dtype else acc * by  # under autocast it is narrower


def _sums(x: Tensor, weight: Tensor, *window: Any) -> Tensor:
    """Convolution with integer `weight`; stride, padding, dilation and groups follow it."""
    functions = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
    return functions[weight.ndim](x, weight.to(x.dtype), None, *window)


def _conv(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """Integer convolution in 1 to 3 dimensions: `weight` int8 `[O, I/groups, *K]`, `bias` int32."""
    acc = _sums((x / x_scale).round_(), weight, list(stride), list(padding), list(dilation), groups)
    return _requantize(acc, bias, x_scale * scale, 1)


def _linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Integer matrix product over the last dimension: `weight` int8 `[O, I]`, `bias` int32."""
    acc = F.linear((x / x_scale).round_(), weight.to(x.dtype))
    return _requantize(acc, bias, x_scale * scale, acc.ndim - 1)


def _dynamic_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Integer matrix product of `x`, rounded to the grid of its range, plus a float bias."""
    step, zero = choose_qparams(x.amin(), x.amax(), DYNAMIC)
    acc = F.linear(quantize(x, step, zero, DYNAMIC).sub_(zero), weight.to(x.dtype))
    out = _requantize(acc, None, step * scale, acc.ndim - 1)
    return out if bias is None else out + bias


# Defined by schema rather than by `torch.library.custom_op`: the same operators, but the first call
# of one made that way imports torch's compiler, two seconds that no command of ours needs. A tracer
# is told the shape of the result alone: following the arithmetic took a third of an export.
_LIBRARY = torch.library.Library("mpq", "DEF")


def _operator(
    signature: str, kernel: Callable[..., Tensor], shape: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    name = kernel.__name__.removeprefix("_")
    _LIBRARY.define(f"{name}({signature}) -> Tensor")
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mpq::{name}", shape, lib=_LIBRARY)
    made: Callable[..., Tensor] = getattr(torch.ops.mpq, name).default
    return made


_QUANTIZED = "Tensor x, Tensor x_scale, Tensor weight, Tensor scale, Tensor? bias"
_WINDOW = "int[] stride, int[] padding, int[] dilation, int groups"
fake_quantize = _operator(
    "Tensor x, Tensor scale, Tensor zero_point, int qmin, int qmax",
    _fake_quantize,
    lambda x, *_: torch.empty_like(x),
)
dequantize = _operator(
    "Tensor weight, Tensor scale, int axis",
    _dequantize,
    lambda weight, scale, axis: torch.empty_like(weight, dtype=scale.dtype),
)
conv = _operator(
    f"{_QUANTIZED}, {_WINDOW}",
    _conv,
    lambda x, x_scale, weight, scale, bias, *window: _sums(x, weight, *window),
)
linear = _operator(
    _QUANTIZED, _linear, lambda x, x_scale, weight, scale, bias: F.linear(x, weight.to(x.dtype))
)
dynamic_linear = _operator(
    "Tensor x, Tensor weight, Tensor scale, Tensor? bias",
    _dynamic_linear,
    lambda x, weight, scale, bias: F.linear(x, weight.to(x.dtype)),
)
