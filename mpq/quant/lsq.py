"""Fake quantization with a learned step (Esser et al., "Learned Step Size Quantization", 2020).

Forward is the one formula of `mpq.numerics`. Backward passes the gradient straight through inside
the range; with `v = x / s` and `q = clip(rint(v), qmin - z, qmax - z)` the step receives
`dy/ds = q - [v inside] v`, scaled by `g = 1 / sqrt(n qmax)`.

Nothing is kept for the backward pass but `x`, which the layer before keeps anyway, and where one
step serves a whole float tensor what comes out, `y = s q`, which the next layer keeps anyway: of
them `ds = (y - [v inside] x) / s` needs no division and no rounding. Elsewhere `q` is computed
again. There are two ways to the same numbers: on a CPU piece by piece, so that the passes of a
piece find it in the cache; and as a whole, for accelerators and for a compiler, which fuses the
passes itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mpq.numerics import fake_quantize, per_axis
from mpq.spec import QuantSpec

EDGE = 1e-6
"""Values this much, relatively, beyond an end of the range count as lying on it. An end at zero is
outside, as ReLU has it: a quantizer that begins there passes what the ReLU before it would."""

PIECE = 2**18
"""Elements at a time and thread on a CPU: a megabyte, so that a few such buffers fit its cache. A
piece of that size shared by threads is too small for them to gain by it."""

HALVES = (torch.bfloat16, torch.float16)
"""Their 8 or 11 significant bits do not hold an 8-bit grid: computed in float32. They come out as
they came in: a layer that computes in halves would round its input to them itself."""


class _LearnedStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, axis: int, g: float
    ) -> Tensor:
        ctx.spec, ctx.axis, ctx.g = spec, axis, g
        if not _in_pieces(x, scale, zero, axis):
            ctx.save_for_backward(x, scale, zero)
            return fake_quantize(_wide(x), scale, zero, spec, axis).to(x.dtype)
        low, high = _ends(spec, zero)
        out = torch.empty_like(x)
        for rows, s in _pieces(x, scale):
            if x.dtype in HALVES:
                out[rows] = _on_grid(x[rows], s, low, high)
            else:
                torch.div(x[rows], s, out=out[rows]).round_().clamp_(low, high).mul_(s)
        kept = (out,) if scale.numel() == 1 and x.dtype not in HALVES else ()
        ctx.save_for_backward(x, scale, zero, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero, *kept = ctx.saved_tensors
        if not _in_pieces(x, scale, zero, ctx.axis):
            dx, ds = _backward_whole(grads[0], x, scale, zero, ctx.spec, ctx.axis)
        elif scale.numel() == 1:
            dx, ds = _backward_one(grads[0], x, kept, scale, zero, ctx.spec)
        else:
            dx, ds = _backward_rows(grads[0], x, scale, zero, ctx.spec)
        return dx, ds.to(scale.dtype) * ctx.g, None, None, None, None


def _backward_whole(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, axis: int
) -> tuple[Tensor, Tensor]:
    s, z = per_axis(scale, x.ndim, axis), per_axis(zero, x.ndim, axis)
    v = _wide(x) / s
    low, high = spec.qmin - z, spec.qmax - z
    inside = (v > low - EDGE * low.abs()) & (v < high + EDGE * high.abs())
    dx = torch.where(inside, grad, 0.0)
    q = torch.minimum(torch.maximum(v.round(), low.to(v.dtype)), high.to(v.dtype))
    ds = grad * q - dx * v
    return dx, ds.sum() if scale.numel() == 1 else ds.transpose(0, axis).flatten(1).sum(1)


def _backward_one(
    grad: Tensor, x: Tensor, kept: list[Tensor], scale: Tensor, zero: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """With one step, whose ends lie at two values of `x`; `kept` may hold what came out."""
    low, high = _ends(spec, zero)
    step = float(scale)
    dx = torch.empty_like(grad)
    sums = []
    for rows, s in _pieces(x, scale):
        upstream, here, passed = grad[rows], x[rows], dx[rows]
        _pass_inside(upstream, here, step * low, step * high, passed)
        out = kept[0][rows] if kept else _on_grid(here, s, low, high)
        sums.append(_dot(_wide(upstream), out) - _dot(_wide(passed), _wide(here)))
    return dx, torch.stack(sums).sum() / scale


def _backward_rows(
    grad: Tensor, x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """With a step for each row."""
    low, high = _ends(spec, zero)
    dx = torch.empty_like(grad)
    sums = []
    for rows, s in _pieces(x, scale):
        upstream, passed = grad[rows], dx[rows]
        v = x[rows] / s
        _pass_inside(upstream, v, low, high, passed)
        straight = _dot_rows(passed, v)
        sums.append(_dot_rows(upstream, v.round_().clamp_(low, high)) - straight)
    return dx, torch.cat(sums)


def _pass_inside(grad: Tensor, x: Tensor, low: float, high: float, out: Tensor) -> None:
    """`grad` where `x` lies inside, else 0, into `out`.

    By a kernel of float arithmetic: masks and `where` cost twenty times as much.
    """
    ends = (low - EDGE * abs(low), high + EDGE * abs(high))
    torch.ops.aten.hardtanh_backward.grad_input(grad, x, *ends, grad_input=out)


def _on_grid(x: Tensor, s: Tensor, low: float, high: float) -> Tensor:
    return (_wide(x) / s).round_().clamp_(low, high).mul_(s)


def _in_pieces(x: Tensor, scale: Tensor, zero: Tensor, axis: int) -> bool:
    """Whether rows can be taken one after another: on a CPU, with the steps along them."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or not x.numel():
        return False
    if scale.numel() == 1:
        return True
    return axis == 0 and x.dtype not in HALVES and bool((zero == zero[0]).all())


def _pieces(x: Tensor, scale: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of `x` of about `PIECE` elements for each thread, and their steps."""
    one = scale.numel() == 1
    s = per_axis(scale, x.ndim)
    size = PIECE * torch.get_num_threads()
    count = max(1, size * len(x) // max(1, x.numel()))
    for start in range(0, len(x), count):
        rows = slice(start, start + count)
        yield rows, s if one else s[rows]


def _ends(spec: QuantSpec, zero: Tensor) -> tuple[float, float]:
    z = float(zero.reshape(-1)[0])
    return spec.qmin - z, spec.qmax - z


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in HALVES else x


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """`sum a b`, without the product in memory where both lie there in the same order."""
    order = sorted(range(a.ndim), key=a.stride, reverse=True)
    rows, others = a.permute(order), b.permute(order)
    if rows.is_contiguous() and others.is_contiguous() and a.dtype == b.dtype:
        return torch.dot(rows.view(-1), others.view(-1))
    return (a * b).sum()


def _dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """`sum a b` of each row."""
    return (a * b).flatten(1).sum(1)


def learned_fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantSpec, *, axis: int, count: int
) -> Tensor:
    """Fake-quantize `x`, differentiable in `x` and `scale`.

    Args:
        x: any tensor; halves are computed in float32 and come out as halves.
        scale: positive steps, shape `[]` or `[C]`.
        zero_point: integers shaped like `scale`.
        spec: the format.
        axis: the dimension of per-channel steps.
        count: elements that share a step (for activations: of one image), for LSQ's `g`.
    """
    g = (max(count, 1) * max(spec.qmax, 1)) ** -0.5
    out: Tensor = _LearnedStep.apply(x, scale, zero_point, spec, axis, g)  # type: ignore[no-untyped-call]
    return out
