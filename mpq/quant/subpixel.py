"""A transposed convolution as an ordinary one on coarse pixels, its channels interleaved.

With stride `s`, kernel `w` and padding `p` the output is `y[o] = sum x[i] w[t]` over all `i, t`
with `i s + t - p = o`. Writing `t = a s + r` and `o + p = q s + r` with `0 <= r < s` gives, for
each phase `r`, `y[q s + r - p] = sum_a x[q - a] w[a s + r]`: an ordinary convolution of `x` with
every `s`-th weight, turned around. So `s` (in two dimensions `s^2`) convolutions give the phases,
as channels of one, and what is left is to interleave and crop them (W. Shi et al., "Is the
deconvolution layer the same as a convolutional layer?", 2016). Every sum has the same terms, and
zeros where the kernel ends within a block; moving values rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis.

    Args:
        kernel: positions of the transposed kernel.
        stride: phases of the output.
        dilation: distance of kernel positions; other than 1 only with stride 1.
        taps: positions of the convolution's kernel.
        padding: zeros on either side of its input.
        start: outputs to drop at the beginning.
        growth: outputs beyond `stride` times the input's size.
    """

    kernel: int
    stride: int
    dilation: int
    taps: int
    padding: int
    start: int
    growth: int

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, output_padding: int, dilation: int) -> Axis:
        """The axis of a transposed convolution."""
        taps = -(-kernel // stride)
        reach = dilation * (taps - 1)
        last = dilation * (kernel - 1) + output_padding - padding
        pad = max(reach - padding // stride, last // stride, 0)
        return cls(
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            taps=taps,
            padding=pad,
            start=padding - (reach - pad) * stride,
            growth=last - padding + 1 - stride,
        )

    def length(self, size: int) -> int:
        """Outputs of an input of that size."""
        return self.stride * size + self.growth


def axes_of(
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[Axis, ...]:
    """The axes of a transposed convolution."""
    each = zip(kernel, stride, padding, output_padding, dilation, strict=True)
    return tuple(Axis.of(*one) for one in each)


def phases(axes: Sequence[Axis]) -> int:
    """How many phases the output has: the product of the strides."""
    return math.prod(axis.stride for axis in axes)


def kernels(weight: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Weights `[I, O, *K]` of a transposed convolution as `[O * phases, I, *taps]`.

    The phases of an output channel follow each other, in the order of the axes.
    """
    inputs, outputs = weight.shape[:2]
    ends = [axis.taps * axis.stride - axis.kernel for axis in axes]
    if any(ends):
        weight = F.pad(weight, [n for end in reversed(ends) for n in (0, end)])
    split = [n for axis in axes for n in (axis.taps, axis.stride)]
    taps = [2 + 2 * k for k in range(len(axes))]
    order = [1, *(k + 1 for k in taps), 0, *taps]
    found = weight.reshape(inputs, outputs, *split).permute(order)
    found = found.reshape(outputs * phases(axes), inputs, *(axis.taps for axis in axes))
    long = [2 + k for k, axis in enumerate(axes) if axis.taps > 1]
    return found.flip(long) if long else found


def per_phase(values: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Values `[O]` of output channels as `[O * phases]`; one for all stays one."""
    count = phases(axes)
    if values.ndim == 0 or count == 1:
        return values
    return values.reshape(-1, 1).expand(-1, count).reshape(-1)


def interleave(out: Tensor, axes: Sequence[Axis], sizes: Sequence[int]) -> Tensor:
    """The phases `[N, O * phases, *blocks]` in their places: `[N, O, *outputs]`.

    Args:
        out: what the convolution gives.
        axes: of the transposed convolution.
        sizes: of its input.
    """
    strides = [axis.stride for axis in axes]
    if phases(axes) > 1:
        out = _shuffle(out, strides)
    for dim, (axis, size) in enumerate(zip(axes, sizes, strict=True)):
        if axis.start or axis.length(size) != out.shape[2 + dim]:
            out = out.narrow(2 + dim, axis.start, axis.length(size))
    return out


def _shuffle(out: Tensor, strides: Sequence[int]) -> Tensor:
    if len(strides) == 2 and strides[0] == strides[1]:
        return F.pixel_shuffle(out, strides[0])  # what ONNX calls DepthToSpace
    rank, blocks = len(strides), out.shape[2:]
    channels = out.shape[1] // math.prod(strides)
    apart = out.reshape(-1, channels, *strides, *blocks)
    order = [0, 1, *(d for k in range(rank) for d in (2 + rank + k, 2 + k))]
    joined = [n * s for n, s in zip(blocks, strides, strict=True)]
    return apart.permute(order).reshape(-1, channels, *joined)
