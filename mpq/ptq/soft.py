"""Stand-ins for the quantizers of a block while its rounding is learned.

Weights: a real number per weight, in steps, that is rounded in the forward pass and receives the
gradient of its integer, and a learned step per channel (Hubara et al., "Accurate Post Training
Quantization With Small Calibration Sets", 2021). They begin where sequential rounding stopped, so
that nothing learned means nothing changed. AdaRound's soft rounding (Nagel et al., "Up or Down?
Adaptive Rounding for Post-Training Quantization", 2020), which a regularizer drives to 0 or 1,
begins at the real weights instead and needs many times the steps to get past that start.
Activations: a learned step, and each value left unquantized with probability `DROP`, which flattens
the loss (Wei et al., "QDrop: Randomly Dropping Quantization for Extremely Low-bit Post-Training
Quantization", 2022). In eval mode nothing is left unquantized.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mpq.numerics import TINY, per_axis
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer, Reference
from mpq.quant.lsq import learned_fake_quantize

NEAR = 0.45
"""How far from the integer chosen so far a weight may begin, in steps."""
DROP = 0.5
WIDEST = 6
"""Widest weights, in bits, whose rounding is learned: above, nearest is as good."""


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class SoftLayer(nn.Module):
    """A quantized layer whose integers, where they are narrow, and bias can be learned.

    Args:
        layer: the layer, with the integers that it has so far.
        target: the real weights that they stand for, shaped like its weights.
    """

    def __init__(self, layer: QuantLayer, target: Tensor) -> None:
        super().__init__()
        self._layer = Reference(layer)
        self.step = layer.step().detach()
        self.hard = layer.integers().float()
        self.reals: nn.Parameter | None = None
        self.log_ratio = nn.Parameter(torch.zeros_like(self.step))
        if layer.spec.bits <= WIDEST:
            off = (target / self._per_weight(self.step) - self.hard).clamp(-NEAR, NEAR)
            self.reals = nn.Parameter(self.hard + off)
        bias = layer.bias
        self.move = None if bias is None else nn.Parameter(torch.zeros_like(bias))
        self.unit: Tensor | float = 1.0

    @property
    def layer(self) -> QuantLayer:
        """The layer that this one stands in for."""
        return self._layer.module

    def _per_weight(self, step: Tensor) -> Tensor:
        return per_axis(step, self.layer.weight.ndim, self.layer.op.axis)

    def scale(self) -> Tensor:
        """The steps as learned so far."""
        return self.step * self.log_ratio.exp()

    def integers(self) -> Tensor:
        """The weights in units of their step, as learned so far."""
        if self.reals is None:
            return self.hard
        spec = self.layer.spec
        rounded: Tensor = _Rounded.apply(self.reals.clamp(spec.qmin, spec.qmax))  # type: ignore[no-untyped-call]
        return rounded

    def bias(self) -> Tensor | None:
        """The bias as learned so far."""
        if self.layer.bias is None or self.move is None:
            return None
        return self.layer.bias.detach() + self.move * self.unit

    def forward(self, x: Tensor) -> Tensor:
        """The layer in float arithmetic."""
        op = self.layer.op
        out = op.float(x, self.integers() * self._per_weight(self.scale()), self.bias())
        if isinstance(self.unit, float):  # the first batch tells how large a step of a bias is
            self.unit = op.by_channel(out.detach()).std(1).clamp(min=TINY)
        return out

    @torch.no_grad()
    def harden(self) -> None:
        """Write what was learned into the layer: weights on their grid, and the bias."""
        layer, bias = self.layer, self.bias()
        layer.weight.copy_(self.integers() * self._per_weight(self.scale()))
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        layer.set_scale(self.scale())


class SoftQuant(nn.Module):
    """An activation quantizer with a learned step that now and then lets a value through.

    Args:
        quantizer: gives format, zero point and the first step.
        generator: decides what is let through.
    """

    def __init__(self, quantizer: FakeQuant, generator: torch.Generator) -> None:
        super().__init__()
        self._quantizer, self.generator = Reference(quantizer), generator
        self.log_ratio = nn.Parameter(torch.zeros(()))

    @property
    def quantizer(self) -> FakeQuant:
        """The quantizer that this one stands in for."""
        return self._quantizer.module

    def step(self) -> Tensor:
        """The step as learned so far, within what the quantizer's ceiling allows."""
        one = self.quantizer
        step = one.step().detach() * self.log_ratio.exp()
        return step if one.ceiling is None else step.clamp(max=one.ceiling / one.spec.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize a random half of the values of a narrow format, all of a wide one."""
        one = self.quantizer
        if one.ceiling is not None:
            x = x.clamp(max=one.ceiling)
        rounded = learned_fake_quantize(
            x, self.step(), one.zero_point, one.spec, axis=0, count=x[0].numel()
        )
        if one.spec.bits > WIDEST or not self.training:
            return rounded
        keep = torch.rand(x.shape, generator=self.generator) < DROP
        return torch.where(keep, x, rounded)

    @torch.no_grad()
    def harden(self) -> None:
        """Write the learned step into the quantizer."""
        self.quantizer.scale.copy_(self.step())
