"""`LayerOp`: which operation a layer is, and how it is computed in float and on integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.quant import ops, subpixel

CONVS: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
}
TRANSPOSED: dict[type[nn.Module], Callable[..., Tensor]] = {
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
}
LAYERS = (*CONVS, *TRANSPOSED, nn.Linear)


def refusal(module: nn.Module) -> str | None:
    """Why a Conv or Linear module cannot be quantized; None if it can."""
    if type(module) not in LAYERS:
        return f"{type(module).__name__} is not a layer that mpq quantizes"
    if getattr(module, "padding_mode", "zeros") != "zeros":
        return f"padding_mode={module.padding_mode!r} has no counterpart in an ONNX Conv"
    padding = getattr(module, "padding", 0)
    if padding == "same" and _same_padding(module) is None:
        return "padding='same' with an even kernel pads unevenly"
    return None


def _same_padding(module: nn.Module) -> tuple[int, ...] | None:
    totals = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]  # type: ignore[arg-type]
    return None if any(t % 2 for t in totals) else tuple(t // 2 for t in totals)


@dataclass(frozen=True, slots=True)
class LayerOp:
    """Which operation a layer is, and its attributes."""

    kind: Literal["conv", "conv_transpose", "linear"]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> LayerOp:
        """Read the attributes of a torch layer."""
        if isinstance(module, nn.Linear):
            return cls("linear")
        assert isinstance(module, nn.modules.conv._ConvNd)
        padding = module.padding
        if isinstance(padding, str):
            padding = (
                (0,) * len(module.stride) if padding == "valid" else (_same_padding(module) or ())
            )
        kind: Literal["conv", "conv_transpose"] = (
            "conv_transpose" if type(module) in TRANSPOSED else "conv"
        )
        return cls(
            kind,
            tuple(module.stride),
            tuple(padding),
            tuple(module.output_padding),
            tuple(module.dilation),
            module.groups,
        )

    @property
    def axis(self) -> int:
        """The weight dimension that carries the scales: output channels where they are one."""
        return 1 if self.kind == "conv_transpose" and self.groups == 1 else 0

    def channel(self, values: Tensor) -> int:
        """The dimension of its input, or its output, that counts channels."""
        return values.ndim - 1 if self.kind == "linear" else 1

    def by_channel(self, values: Tensor) -> Tensor:
        """Its input or output as `[channels, values of each]`."""
        return values.transpose(0, self.channel(values)).flatten(1)

    def float(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation."""
        if self.kind == "linear":
            return F.linear(x, weight, bias)
        rank = weight.ndim - 2
        if self.kind == "conv":
            function = list(CONVS.values())[rank - 1]
            return function(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        function = list(TRANSPOSED.values())[rank - 1]
        return function(
            x,
            weight,
            bias,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
        )

    def weight_gradients(self, x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
        """`[N, weights]`: for each sample, the gradient of `sum(grad * conv(x, weight))`."""
        count = len(x)  # samples become groups of one convolution; its weights do not matter
        shape = count * len(weight), *weight.shape[1:]
        tensors = (*(t.reshape(1, -1, *t.shape[2:]) for t in (grad, x)), weight.new_empty(shape))
        window = (self.stride, self.padding, self.dilation, False, [0] * len(self.stride))
        groups, wanted = count * self.groups, [False, True, False]
        made = torch.ops.aten.convolution_backward(*tensors, None, *window, groups, wanted)
        found: Tensor = made[1].reshape(count, -1)
        return found

    def integer(
        self, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The integer operation on an input that lies on the grid of `x_scale`."""
        if self.kind == "linear":
            return ops.linear(x, x_scale, weight, scale, bias)
        if self.kind == "conv":
            window = (self.stride, self.padding, self.dilation, self.groups)
            return ops.conv(x, x_scale, weight, scale, bias, *window)
        return self._phases(x, x_scale, weight, scale, bias)

    def _phases(
        self, x: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None
    ) -> Tensor:
        """A transposed convolution as an ordinary one (`mpq.quant.subpixel`)."""
        window = (self.stride, self.padding, self.output_padding, self.dilation)
        axes = subpixel.axes_of(weight.shape[2:], *window)
        out = ops.conv(
            x,
            x_scale,
            subpixel.kernels(weight, axes),
            subpixel.per_phase(scale, axes),
            None if bias is None else subpixel.per_phase(bias, axes),
            [1] * len(axes),
            [axis.padding for axis in axes],
            self.dilation,
            1,
        )
        return subpixel.interleave(out, axes, x.shape[2:])


def integer_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """The int32 bias with scale `s_x * s_w` that integer kernels add to the accumulator."""
    limit = 2**31 - 1
    return torch.round(bias.double() / scale.double()).clamp(-limit, limit).to(torch.int32)
