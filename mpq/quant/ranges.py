"""Where to clip a tensor: the scale that loses least, by search over clip ratios.

From 7 bits on, clipping buys nothing and the range decides. Below, an outlier costs every other
value its precision, so each scale is searched: with `s_0` the clip-free scale, `s = r s_0` for `r`
in `CLIP_RATIOS` that minimises `sum_k h_k (x_k - Q(x_k))^2` (Banner et al., "Post training 4-bit
quantization of convolutional networks", 2019, search the same optimum in closed form). The search
is `best_ratio`; what the loss is, is the caller's: error of weights, of a layer's output, of a
histogram, or its divergence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpq.numerics import choose_qparams, fake_quantize
from mpq.spec import QuantSpec

CLIP_RATIOS = tuple(round(1.0 - 0.02 * i, 2) for i in range(31))
"""1.0 down to 0.4; the widest range that is as good as any other is taken."""
STOP_RATIO = 4.0
"""Times the least squared error at which the search ends: no narrower range is better then."""

SEARCHED = 6
"""Widest format, in bits, whose range is searched rather than taken as it is."""


@torch.no_grad()
def weight_scales(
    weight: Tensor, spec: QuantSpec, axis: int = 0, *, second_moment: Tensor | None = None
) -> Tensor:
    """Scales of a weight tensor: clip-free at 8 bits and more, of least squared error below.

    Args:
        weight: any shape, output channels along `axis`.
        spec: a signed format.
        axis: dimension of the output channels.
        second_moment: `h >= 0`, importance of each weight, broadcastable to `[C, K]` (the weight
            with `axis` in front, flattened): the mean square of the input that it multiplies.

    Returns:
        `[C]`, or `[]` for one scale per tensor; float32, positive.
    """
    flat = weight.detach().float().transpose(0, axis).flatten(1)
    scale, zero = choose_qparams(flat.amin(1), flat.amax(1), spec)
    if spec.granularity == "tensor":
        scale, zero = scale.amax(), zero[0]
    if spec.bits > SEARCHED:
        return scale

    def error(ratio: float) -> Tensor:
        squares = (fake_quantize(flat, scale * ratio, zero, spec) - flat).square_()
        squares = squares if second_moment is None else squares * second_moment
        return squares.sum() if spec.granularity == "tensor" else squares.sum(1)

    return scale * best_ratio(error)


@torch.no_grad()
def activation_range(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Range of a tensor, `low <= 0 <= high`: as it is at 8 bits, of least squared error below.

    Args:
        values: any shape; a sample of some 10^5 values is enough.
        spec: a per-tensor format.

    Returns:
        low and high, both `[]`, for `choose_qparams`.
    """
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    if spec.bits > SEARCHED:
        return low, high

    def error(ratio: float) -> Tensor:
        scale, zero = choose_qparams(low * ratio, high * ratio, spec)
        return (fake_quantize(values, scale, zero, spec) - values).square_().sum()

    ratio = best_ratio(error)
    return low * ratio, high * ratio


def best_ratio(
    error: Callable[[float], Tensor],
    ratios: Sequence[float] = CLIP_RATIOS,
    *,
    stop_ratio: float = STOP_RATIO,
) -> Tensor:
    """The ratio of least error, elementwise over whatever shape `error` returns; ties go first.

    The search is over when every error is so many times the least: at 8 bits clipping soon costs
    far more than rounding does.

    Args:
        error: the loss at a clipping ratio.
        ratios: what to try, the widest range first.
        stop_ratio: times the least error at which the search ends.
    """
    best = error(ratios[0])
    chosen = torch.full_like(best, ratios[0])
    for ratio in ratios[1:]:
        now = error(ratio)
        chosen = torch.where(now < best, ratio, chosen)
        best = torch.minimum(now, best)
        if bool(((now > stop_ratio * best) | (best == 0)).all()):
            break
    return chosen
