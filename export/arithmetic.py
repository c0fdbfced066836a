"""What other CPUs compute otherwise: the kernels of onnxruntime that are written per architecture.

The integer sums are the same everywhere. Three kernels round in another order elsewhere than on
x86, which `kernels.py` has: QLinearAdd and QLinearMul on ARM and in WebAssembly, and the float sum
at the end of MatMulIntegerToFloat on ARM. Found by running single kernels over all
pairs of integers; tests/test_arithmetic.py holds what each runtime gave, docs/exact.md the
formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mpq.target import Arithmetic

from .kernels import (
    F32,
    KERNELS,
    Array,
    Attributes,
    Kernel,
    all_of,
    dynamic_quantize,
    product,
    round_shifted,
)


def add_fixed_point(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearAdd on ARM: both ratios as integers of 22 bits, ties away from zero.

    With `sh = 21 - floor(log2 max(r_a, r_b))` and `m = rint(r 2^sh)`,
    `y = clip((acc + [acc < 0] (-1) + 2^(sh - 1)) >> sh + z_y)` of
    `acc = (a - z_a) m_a + (b - z_b) m_b`. Ratios that do not fit go the way of `add_floats`.
    """
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    ratios = np.asarray([as_ / ys, bs / ys], F32)
    shift = 21 - int(np.floor(np.log2(ratios.max())))
    factors = np.rint(ratios.astype(np.float64) * 2.0**shift).astype(np.int64)
    if ratios.min() < 2.0**-14 or ratios.max() >= 256 or factors.max() >= 1 << 22:
        return add_floats(inputs, attributes)
    acc = _centred(a, az) * factors[0] + _centred(b, bz) * factors[1]
    y = ((acc - (acc < 0) + (1 << (shift - 1))) >> shift) + yz.astype(np.int64)
    return _clipped(y, yz)


def add_floats(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearAdd in WebAssembly: `rint((s_a (a - z_a) + s_b (b - z_b)) / s_y + z_y)` in float32."""
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    total = as_ * _centred(a, az).astype(F32) + bs * _centred(b, bz).astype(F32)
    return _within(total / ys, yz)


def multiply_fused(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearMul on ARM: the product enters the sum with the zero point unrounded."""
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    acc = (_centred(a, az) * _centred(b, bz)).astype(np.float64)
    exact = acc * np.float64(F32(as_ * bs / ys)) + yz.astype(np.float64)
    return round_shifted(exact.astype(F32), np.zeros_like(yz))


def multiply_floats(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """QLinearMul in WebAssembly: `rint((s_a (a - z_a)) (s_b (b - z_b)) / s_y + z_y)`."""
    a, as_, az, b, bs, bz, ys, yz = all_of(inputs[:8])
    values = (as_ * _centred(a, az).astype(F32)) * (bs * _centred(b, bz).astype(F32))
    return _within(values / ys, yz)


def matmul_float_fused(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """MatMulIntegerToFloat on ARM: the product enters the sum with the bias unrounded."""
    a, b, as_, bs, az, bz, bias = (*inputs, *[None] * 7)[:7]
    a, b, as_, bs = all_of([a, b, as_, bs])
    acc = product(_centred(a, az), _centred(b, bz)).astype(F32)
    if bias is None:
        return np.asarray(acc * (as_ * bs))
    exact = acc.astype(np.float64) * (as_ * bs).astype(np.float64) + bias.astype(np.float64)
    return np.asarray(exact.astype(F32))


def dynamic_matmul_fused(inputs: Sequence[Array | None], attributes: Attributes) -> Array:
    """DynamicQuantizeMatMul on ARM; with SME, a kernel of its own has a range for each row."""
    x, b, bs, bz, bias = (*inputs, *[None] * 5)[:5]
    q, scale, zero = dynamic_quantize([x], {})
    return matmul_float_fused([q, b, scale, bs, zero, bz, bias], {})


ARITHMETIC: dict[Arithmetic, dict[str, Kernel]] = {
    "x86": KERNELS,
    "arm64": KERNELS
    | {
        "QLinearAdd": add_fixed_point,
        "QLinearMul": multiply_fused,
        "MatMulIntegerToFloat": matmul_float_fused,
        "DynamicQuantizeMatMul": dynamic_matmul_fused,
    },
    "wasm": KERNELS | {"QLinearAdd": add_floats, "QLinearMul": multiply_floats},
}
"""The kernels of each kind of CPU, by op type in the runtime's optimized graph."""


def kernels_of(arithmetic: Arithmetic | None) -> Mapping[str, Kernel]:
    """The kernels of a kind of CPU; those of x86 for a runtime whose own are not known."""
    return ARITHMETIC.get(arithmetic or "x86", KERNELS)


def _centred(q: Array, zero: Array | None) -> Array:
    return q.astype(np.int64) - (0 if zero is None else zero.astype(np.int64))


def _within(values: Array, zero: Array) -> Array:
    """Limits first, then the zero point, then rounding: the order tells at the ends alone."""
    limits, z = np.iinfo(zero.dtype), zero.astype(F32)
    return round_shifted(np.clip(values, F32(limits.min) - z, F32(limits.max) - z), zero)


def _clipped(values: Array, zero: Array) -> Array:
    limits = np.iinfo(zero.dtype)
    return np.clip(values, limits.min, limits.max).astype(zero.dtype)
