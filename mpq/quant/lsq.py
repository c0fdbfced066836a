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


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, axis: int, g: float
    ) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            x = x.float()  # their 8 or 11 significant bits do not hold an 8-bit grid
        s, z = per_axis(scale, x.ndim, axis), per_axis(zero, x.ndim, axis).to(x.dtype)
        v = x / s + z
        q = v.round().clamp_(spec.qmin, spec.qmax)
        inside = (v >= spec.qmin) & (v <= spec.qmax)
        # What the step's gradient needs is one tensor: q - z inside minus v - z, q - z outside.
        slope = torch.where(inside, q - v, q - z)
        ctx.save_for_backward(inside, slope, scale)
        ctx.axis, ctx.g = axis, g
        return q.sub_(z).mul_(s)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        inside, slope, scale = ctx.saved_tensors
        ds = grad * slope
        if scale.ndim == 0 or scale.numel() == 1:
            d_scale = ds.sum().reshape(scale.shape)
        else:
            d_scale = ds.transpose(0, ctx.axis).flatten(1).sum(1).to(scale.dtype)
        return grad * inside, d_scale * ctx.g, None, None, None, None


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
