"""The runtime's integer kernels in numpy: what each must give, to the last bit, on x86.

Where other CPUs differ is in `arithmetic.py`.

Accumulators are 32-bit integers, and a result is requantized by one float32 factor,

    y = clip(rint(float32(acc) * factor) + z_y)

with `rint` half to even (Jacob et al. 2018, with a float factor). The order of the float32
operations that give `factor` is the runtime's own; docs/exact.md lists it for each kernel. Sums of
products are formed in float64, which is exact far beyond 32 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

Array = NDArray[Any]
Attributes = dict[str, Any]
F32 = np.float32


def quantize(x: Array, scale: Array, zero: Array) -> Array:
    """QuantizeLinear, per tensor: `clip(rint(x / s) + z)`."""
    return _saturate(np.rint(x / scale) + zero.astype(F32), zero.dtype)


def dequantize(q: Array, scale: Array, zero: Array | None = None) -> Array:
    """DequantizeLinear, per tensor: `(q - z) s`."""
    shifted = q.astype(np.int32) - (0 if zero is None else zero.astype(np.int32))
    return shifted.astype(F32) * scale


def requantize(acc: Array, factor: Array | np.float32, zero: Array) -> Array:
    """Integers of an accumulator; `factor` broadcasts against it."""
    return _saturate(np.rint(acc.astype(F32) * factor) + zero.astype(F32), zero.dtype)


def round_shifted(values: Array, zero: Array) -> Array:
    """`clip(rint(v + z))`: of a tie, an odd `z` makes another integer than `rint(v) + z`."""
    return _saturate(np.rint(values + zero.astype(F32)), zero.dtype)


def conv(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearConv, in NCHW or (`channels_last`) NHWC: factor `(s_x s_w) / s_y`."""
    x, xs, xz, w, ws, wz, ys, yz = all_of(inputs[:8])
    bias = inputs[8] if len(inputs) > 8 else None
    last = bool(attributes.get("channels_last", 0))
    if last:
        x = np.moveaxis(x, -1, 1)
    weight = w.astype(np.int32) - wz.astype(np.int32).reshape(-1, *[1] * (w.ndim - 1))
    acc = accumulate(x.astype(np.int32) - xz.astype(np.int32), weight, attributes)
    channels = (-1, *[1] * (acc.ndim - 2))
    if bias is not None:
        acc = acc + bias.reshape(channels)
    y = requantize(acc, (xs * ws / ys).astype(F32).reshape(channels), yz)
    return np.moveaxis(y, 1, -1) if last else y


def accumulate(x: Array, w: Array, attributes: Attributes) -> Array:
    """Sums of a convolution: `x` `[N, C, *S]` and `w` `[O, C/group, *K]`, zero points taken off."""
    rank, group = w.ndim - 2, int(attributes.get("group", 1))
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    kernel = w.shape[2:]
    x = np.pad(x.astype(F32), [(0, 0), (0, 0), *zip(pads[:rank], pads[rank:], strict=True)])
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    windows = sliding_window_view(x, extent, axis=tuple(range(2, 2 + rank)))
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    windows = windows[(slice(None), slice(None), *steps)]
    if group == x.shape[1] == w.shape[0]:
        return _depthwise(windows, w, rank)
    inputs, outputs = w.shape[1], w.shape[0] // group
    parts = [
        _dense(windows[:, g * inputs : (g + 1) * inputs], w[g * outputs : (g + 1) * outputs], rank)
        for g in range(group)
    ]
    return np.concatenate(parts, axis=1)


def gemm(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QGemm: factor `(alpha s_a s_b) / s_y`, or floats `acc (alpha s_a s_b)` without `s_y`."""
    a, as_, az, b, bs, bz = all_of(inputs[:6])
    left, right = a.astype(np.int32) - az.astype(np.int32), b.astype(np.int32)
    if attributes.get("transA"):
        left = left.T
    if attributes.get("transB"):
        right = right.T
    acc = product(left, right - bz.astype(np.int32))
    if len(inputs) > 6 and inputs[6] is not None:
        acc = acc + inputs[6]
    factor = F32(attributes.get("alpha", 1.0)) * as_ * bs
    return _leave(acc, factor, inputs[7:9])


def matmul(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearMatMul: factor `(s_a s_b) / s_y`."""
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    acc = product(a.astype(np.int32) - az.astype(np.int32), b.astype(np.int32) - bz.astype(int))
    return _leave(acc, as_ * bs, (ys, yz))


def matmul_float(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """MatMulIntegerToFloat: floats `acc (s_a s_b) + bias`."""
    a, b, as_, bs, az, bz, bias = (*inputs, *[None] * 7)[:7]
    a, b, as_, bs = all_of([a, b, as_, bs])
    left = a.astype(np.int32) - (0 if az is None else az.astype(np.int32))
    right = b.astype(np.int32) - (0 if bz is None else bz.astype(np.int32))
    y: Array = product(left, right).astype(F32) * (as_ * bs)
    return y if bias is None else y + bias


def dynamic_quantize(inputs: Sequence[Array | None], attributes: Attributes) -> list[Array]:
    """DynamicQuantizeLinear: the range of the tensor and 0, `s = (high - low) / 255`."""
    (x,) = all_of(inputs)
    low, high = min(F32(x.min()), F32(0)), max(F32(x.max()), F32(0))
    scale = F32((high - low) / F32(255)) if high > low else F32(1)
    zero = np.uint8(np.rint(np.clip(-low / scale, 0, 255)))
    return [quantize(x, np.asarray(scale), np.asarray(zero)), np.asarray(scale), np.asarray(zero)]


def dynamic_matmul(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """DynamicQuantizeMatMul: the two above in one."""
    x, b, bs, bz, bias = (*inputs, *[None] * 5)[:5]
    q, scale, zero = dynamic_quantize([x], {})
    return matmul_float([q, b, scale, bs, zero, bz, bias], {})


def add(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearAdd: `rint(a r_a + (b r_b + c))`, each product fused with the sum it enters.

    With `r_a = s_a / s_y`, `r_b = s_b / s_y` and `c = z_y - (r_a z_a + r_b z_b)`, fused likewise.
    """
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    ra, rb = F32(as_ / ys), F32(bs / ys)
    fixed = yz.astype(F32) - fma(az, ra, rb * bz.astype(F32))
    return _saturate(np.rint(fma(a, ra, fma(b, rb, fixed))), yz.dtype)


def multiply(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearMul: the product of both integers, factor `(s_a s_b) / s_y`; `z_y` before rounding."""
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    acc = (a.astype(np.int32) - az.astype(np.int32)) * (b.astype(np.int32) - bz.astype(np.int32))
    return round_shifted(acc.astype(F32) * F32(as_ * bs / ys), yz)


def global_average(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearGlobalAveragePool: the sum over positions, factor `s_x / (s_y count)`."""
    x, xs, xz, ys, yz = all_of(inputs[:5])
    last = bool(attributes.get("channels_last", 0))
    axes = tuple(range(1, x.ndim - 1)) if last else tuple(range(2, x.ndim))
    acc = (x.astype(np.int32) - xz.astype(np.int32)).sum(axes, keepdims=True)
    count = F32(math.prod(x.shape[a] for a in axes))
    return requantize(acc, F32(xs / F32(ys * count)), yz)


def average(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearAveragePool: the mean of the dequantized window in float32, `rint(mean / s + z)`."""
    x, xs, xz, ys, yz = all_of(inputs[:5])
    last = bool(attributes.get("channels_last", 0))
    if last:
        x = np.moveaxis(x, -1, 1)
    windows, inside = _windows(dequantize(x, xs, xz), attributes, F32(0))
    rank = len(attributes["kernel_shape"])
    total = np.zeros(windows.shape[: 2 + rank], F32)
    for position in np.ndindex(*windows.shape[-rank:]):
        total += windows[(Ellipsis, *position)]
    if attributes.get("count_include_pad"):
        inside = np.ones_like(inside)
    count = inside.sum(tuple(range(-rank, 0))).astype(F32)
    y = round_shifted((total / count).astype(F32) / ys, yz)
    return np.moveaxis(y, 1, -1) if last else y


def concat(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearConcat: every part by a table from its grid to that of the result."""
    ys, yz, *parts = all_of(inputs)
    done = []
    for x, xs, xz in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        table = quantize(dequantize(np.arange(256, dtype=np.uint8).view(x.dtype), xs, xz), ys, yz)
        done.append(x if xs == ys and xz == yz else table[x.view(np.uint8)])
    return np.concatenate(done, axis=attributes["axis"])


def sigmoid(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearSigmoid: a table over the 256 inputs.

    The runtime fills it with an approximation of the logistic function that is good to float32;
    where the exact value lies within that error of a tie, the table differs by one step.
    """
    x, xs, xz, ys, yz = all_of(inputs[:5])
    values = dequantize(np.arange(256, dtype=np.uint8).view(x.dtype), xs, xz)
    logistic = (1 / (1 + np.exp(-values.astype(np.float64)))).astype(F32)
    return quantize(logistic, ys, yz)[x.view(np.uint8)]


def max_pool(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """MaxPool of integers, in NCHW or, as NhwcMaxPool, in NHWC (`channels_last`)."""
    (x,) = all_of(inputs[:1])
    last = bool(attributes.get("channels_last", 0))
    if last:
        x = np.moveaxis(x, -1, 1)
    windows, _ = _windows(x, attributes, np.iinfo(x.dtype).min)
    y = windows.max(tuple(range(-len(attributes["kernel_shape"]), 0)))
    return np.moveaxis(y, 1, -1) if last else y


Kernel = Callable[[Sequence[Array | None], Attributes], Array | list[Array]]
KERNELS: dict[str, Kernel] = {
    "QuantizeLinear": lambda inputs, attributes: quantize(*all_of(inputs[:3])),
    "DequantizeLinear": lambda inputs, attributes: dequantize(*all_of(inputs[:2]), *inputs[2:3]),
    "QLinearConv": conv,
    "QGemm": gemm,
    "QLinearMatMul": matmul,
    "MatMulIntegerToFloat": matmul_float,
    "DynamicQuantizeLinear": dynamic_quantize,
    "DynamicQuantizeMatMul": dynamic_matmul,
    "QLinearAdd": add,
    "QLinearMul": multiply,
    "QLinearGlobalAveragePool": global_average,
    "QLinearAveragePool": average,
    "QLinearConcat": concat,
    "QLinearSigmoid": sigmoid,
    "MaxPool": max_pool,
    "NhwcMaxPool": lambda inputs, attributes: max_pool(inputs, attributes | {"channels_last": 1}),
}
"""Op type in the runtime's optimized graph -> its reference."""


def _windows(x: Array, attributes: Attributes, fill: Any) -> tuple[Array, Array]:
    """Pooling windows of `[N, C, *S]`, `[N, C, *out, *kernel]`, and which positions are inside."""
    kernel = attributes["kernel_shape"]
    rank = len(kernel)
    pads, strides = attributes.get("pads", [0] * 2 * rank), attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    beyond = [s - 1 if attributes.get("ceil_mode") else 0 for s in strides]
    edges = [(a, b + c) for a, b, c in zip(pads[:rank], pads[rank:], beyond, strict=True)]
    extent = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))

    def view(array: Array, value: Any) -> Array:
        padded = np.pad(array, [(0, 0), (0, 0), *edges], constant_values=value)
        found = sliding_window_view(padded, extent, axis=tuple(range(2, 2 + rank)))
        return np.asarray(found[(slice(None), slice(None), *steps)])

    return view(x, fill), view(np.ones((1, 1, *x.shape[2:]), bool), False)


def _saturate(values: Array, dtype: np.dtype[Any]) -> Array:
    limits = np.iinfo(dtype)
    return np.clip(values, limits.min, limits.max).astype(dtype)


def _leave(acc: Array, factor: Array, output: Sequence[Array | None]) -> Array:
    """Requantize to the output's grid, or give floats where there is none."""
    if len(output) == 2 and output[0] is not None and output[1] is not None:
        return requantize(acc, (factor / output[0]).astype(F32), output[1])
    return acc.astype(F32) * factor


def product(a: Array, b: Array) -> Array:
    """Integers `a b`, `a` of at most 9 bits: by float32 where it holds every sum, else float64."""
    narrow = 255 * np.abs(b).sum(0, np.int64).max(initial=0) < 2**24
    exact: Array = a.astype(F32) @ b.astype(F32) if narrow else a.astype(float) @ b.astype(float)
    return exact.astype(np.int64)


def _dense(windows: Array, w: Array, rank: int) -> Array:
    """`windows` `[N, C, *S, *K]`, `w` `[O, C, *K]` -> `[N, O, *S]`, image by image."""
    columns, images = w.reshape(len(w), -1).T, []
    for image in windows:
        order = np.moveaxis(image, 0, rank)  # [*S, C, *K]
        rows = order.reshape(math.prod(order.shape[:rank]), -1)  # a copy
        images.append(product(rows, columns).T.reshape(-1, *order.shape[:rank]))
    return np.stack(images)


def _depthwise(windows: Array, w: Array, rank: int) -> Array:
    acc: Array = np.zeros(windows.shape[: 2 + rank], F32)  # of 9 bits times 8, tens of times
    for position in np.ndindex(*w.shape[2:]):
        taps = w[(slice(None), 0, *position)].reshape(-1, *[1] * rank).astype(F32)
        acc += windows[(Ellipsis, *position)] * taps
    return acc.astype(np.int64)


def fma(x: Array, factor: np.float32, addend: Array | np.float32) -> Array:
    """`x factor + addend`, rounded once to float32; the product of 8 and 24 bits is exact."""
    exact = x.astype(np.float64) * np.float64(factor) + np.asarray(addend, np.float64)
    return exact.astype(F32)


def all_of(inputs: Sequence[Array | None]) -> list[Array]:
    """Inputs that the operator requires."""
    return [x for x in inputs if x is not None]
