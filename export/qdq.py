"""Translations of mpq's operators to ONNX: the quantize-dequantize forms that onnxruntime fuses.

Weights leave here as INT8 or INT16 initializers; `pack` gives them their storage form afterwards.
A bias is an INT32 initializer whose scale `s_x * s_w` is a Mul that folds at load: cheaper in the
file than a second vector of scales, and within 1e-7 of what the fusion demands (1 %).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import opset21 as op

from mpq.quant import ops

Value = Any
"""A value of the graph under construction; onnxscript gives it no public type."""


def fake_quantize(x: Value, scale: Value, zero_point: Value, qmin: int, qmax: int) -> Value:
    """Quantize, saturate at fewer than 8 bits on the integers, dequantize."""
    q = op.QuantizeLinear(x, scale, zero_point)
    if (qmin, qmax) not in ((0, 255), (0, 65535)):
        low = op.Constant(value=ir.tensor(qmin, dtype=ir.DataType.UINT8))
        high = op.Constant(value=ir.tensor(qmax, dtype=ir.DataType.UINT8))
        q = op.Clip(q, low, high)
    return op.DequantizeLinear(q, scale, zero_point)


def dequantize(weight: Value, scale: Value, axis: int) -> Value:
    """Weights of a float layer: Cast and Mul fold at load, a DequantizeLinear would not."""
    rank = len(weight.shape)
    shape = [1] * rank
    if len(scale.shape) == 1:
        shape[axis] = -1
        scale = op.Reshape(scale, op.Constant(value_ints=shape))
    return op.Mul(op.Cast(weight, to=ir.DataType.FLOAT), scale)


def _bias(x_scale: Value, scale: Value, bias: Value | None) -> Value | None:
    if bias is None:
        return None
    return op.DequantizeLinear(bias, op.Mul(x_scale, scale), axis=0)


def conv(
    x: Value,
    x_scale: Value,
    weight: Value,
    scale: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Value:
    """DequantizeLinear of weight and bias, Conv: fuses to QLinearConv."""
    return op.Conv(
        x,
        op.DequantizeLinear(weight, scale, axis=0),
        _bias(x_scale, scale, bias),
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def linear(x: Value, x_scale: Value, weight: Value, scale: Value, bias: Value | None) -> Value:
    """Rank 2: Gemm, fuses to QGemm. Higher: MatMul and Add, fuse to MatMulIntegerToFloat."""
    if len(x.shape) == 2:
        w = op.DequantizeLinear(weight, scale, axis=0)
        return op.Gemm(x, w, _bias(x_scale, scale, bias), transB=1)
    w = op.DequantizeLinear(op.Transpose(weight, perm=[1, 0]), scale, axis=1)
    y = op.MatMul(x, w)
    if bias is None:
        return y
    # A float constant once it is folded: the kernel takes that along, and no DequantizeLinear.
    return op.Add(y, op.Mul(op.Cast(bias, to=ir.DataType.FLOAT), op.Mul(x_scale, scale)))


def dynamic_linear(x: Value, weight: Value, scale: Value, bias: Value | None) -> Value:
    """Fuses to DynamicQuantizeMatMul, to MatMulIntegerToFloat where several read one input."""
    q, step, zero = op.DynamicQuantizeLinear(x)
    acc = op.MatMulInteger(q, op.Transpose(weight, perm=[1, 0]), zero)
    y = op.Mul(op.Cast(acc, to=ir.DataType.FLOAT), op.Mul(step, scale))
    return y if bias is None else op.Add(y, bias)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    ops.fake_quantize: fake_quantize,
    ops.dequantize: dequantize,
    ops.conv: conv,
    ops.linear: linear,
    ops.dynamic_linear: dynamic_linear,
}
