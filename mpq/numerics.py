"""The only quantization formulas, and how far apart two answers are: nothing above repeats them.

With scale `s > 0` and zero point `z`, a real `x` is stored as `q = clip(rint(x / s) + z, qmin,
qmax)` and read back as `s * (q - z)`. Rounding is half to even, as ONNX QuantizeLinear and
`torch.round` do it. Per-channel scales have shape `[C]` and belong to dimension `axis`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpq.spec import QuantSpec

TINY = torch.finfo(torch.float32).tiny
"""Smallest scale: an all-zero tensor gets it, so that no division by zero can happen."""


def per_axis(values: Tensor, ndim: int, axis: int = 0) -> Tensor:
    """View `values` of shape `[C]` so that it broadcasts along `axis` of an `ndim` tensor."""
    if values.ndim == 0 or values.numel() == 1:
        return values.reshape(())
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def choose_qparams(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Scale and zero point for reals in `[low, high]` (any equal shapes), zero kept exact.

    Symmetric: `s = max(|low| / |qmin|, |high| / qmax)`, clip-free on both sides, `z = 0`.
    Affine: `s = (high - low) / (qmax - qmin)` over a range that includes 0,
    `z = qmin - rint(low / s)`.

    Returns:
        scale (float32, > 0) and zero point (int32), shaped like `low`.
    """
    low, high = low.float().clamp(max=0), high.float().clamp(min=0)
    if spec.symmetric:
        scale = torch.maximum(low / spec.qmin, high / spec.qmax).clamp(min=TINY)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    scale = ((high - low) / (spec.qmax - spec.qmin)).clamp(min=TINY)
    zero = (spec.qmin - torch.round(low / scale)).clamp(spec.qmin, spec.qmax)
    return scale, zero.to(torch.int32)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0
) -> Tensor:
    """Integers of `x`, as float32 values (exact for every width up to 16)."""
    s, z = per_axis(scale, x.ndim, axis), per_axis(zero_point, x.ndim, axis)
    return (torch.round(x / s) + z).clamp(spec.qmin, spec.qmax)


def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int = 0) -> Tensor:
    """Reals of the integers `q`."""
    s, z = per_axis(scale, q.ndim, axis), per_axis(zero_point, q.ndim, axis)
    return (q.to(s.dtype) - z) * s


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, axis: int = 0
) -> Tensor:
    """`x` rounded to the grid of `spec`: quantize, then dequantize."""
    return dequantize(quantize(x, scale, zero_point, spec, axis), scale, zero_point, axis)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Signal-to-quantization-noise ratio `10 log10(sum x^2 / sum (x - y)^2)` in dB."""
    return decibels(*powers(reference, reference.double() - approximation.double()))


def powers(signal: Tensor, noise: Tensor) -> tuple[float, float]:
    """Sums of squares."""
    return float(signal.double().pow(2).sum()), float(noise.double().pow(2).sum())


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares in dB; infinity where there is no noise."""
    if noise == 0:
        return float("inf")
    return 10 * float(torch.log10(torch.tensor(max(signal, 1e-300) / noise, dtype=torch.float64)))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q) = sum p (log p - log q)` over the last dimension, in nats.

    Of log-probabilities `[..., C]`, as `log_softmax` gives them: both are finite, so that it is
    where p underflows to zero.
    """
    return (log_p.exp() * (log_p - log_q)).sum(-1)
