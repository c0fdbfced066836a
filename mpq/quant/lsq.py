"""Fake quantization with a learned step (Esser et al., "Learned Step Size Quantization", 2020).

Forward is the one formula of `mpq.numerics`. Backward passes the gradient straight through inside
the range; with `v = x / s + z` and `q = clip(rint(v), qmin, qmax)` the step receives
`dy/ds = (q - z) - [qmin <= v <= qmax] (v - z)`, scaled by `g = 1 / sqrt(n qmax)`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq.numerics import per_axis
from mpq.spec import QuantSpec

EDGE = 1e-6
"""Values this much, relatively, beyond an end of the range count as lying on it."""


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, axis: int, g: float
    ) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()  # their 8 or 11 significant bits do not hold an 8-bit grid
        s, z = per_axis(scale, x.ndim, axis), per_axis(zero, x.ndim, axis).to(x.dtype)
        v = (x / s).add_(z)
        q = v.round().clamp_(spec.qmin, spec.qmax).sub_(z)
        ctx.save_for_backward(v, q, scale, z)
        ctx.spec, ctx.axis, ctx.g = spec, axis, g
        return q * s

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        v, q, scale, z = ctx.saved_tensors  # q is q - z already
        dx = _inside(grad, v, ctx.spec)
        if scale.numel() == 1:
            d_scale = _dot(grad, q) - _dot(dx, v) + z * dx.sum()
            d_scale = d_scale.reshape(scale.shape)
        else:
            ds = grad * q - dx * (v - z)
            d_scale = ds.transpose(0, ctx.axis).flatten(1).sum(1)
        return dx, d_scale.to(scale.dtype) * ctx.g, None, None, None, None


def _inside(grad: Tensor, v: Tensor, spec: QuantSpec) -> Tensor:
    """`grad` where `qmin <= v <= qmax`, else 0; the ends count, up to rounding.

    A kernel of float arithmetic: on a CPU masks and `where` cost twenty times as much.
    """
    low, high = (
        end + sign * EDGE * max(1, abs(end)) for end, sign in ((spec.qmin, -1), (spec.qmax, 1))
    )
    out: Tensor = torch.ops.aten.hardtanh_backward(grad, v, low, high)
    return out


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """`sum a b`, without the product in memory where both lie there in the same order."""
    order = sorted(range(a.ndim), key=a.stride, reverse=True)
    rows, others = a.permute(order), b.permute(order)
    if rows.is_contiguous() and others.is_contiguous() and a.dtype == b.dtype:
        return torch.dot(rows.view(-1), others.view(-1))
    return (a * b).sum()


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, *, axis: int, count: int
) -> Tensor:
    """Fake-quantize `x`, differentiable in `x` and `scale`.

    Args:
        x: any tensor.
        scale: positive steps, shape `[]` or `[C]`.
        zero_point: integers shaped like `scale`.
        spec: the format.
        axis: the dimension of per-channel steps.
        count: elements that share a step (for activations: of one image), for LSQ's `g`.
    """
    g = (max(count, 1) * max(spec.qmax, 1)) ** -0.5
    out: Tensor = _LearnedStep.apply(x, scale, zero_point, spec, axis, g)  # type: ignore[no-untyped-call]
    return out
