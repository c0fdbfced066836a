"""Keep narrow weights from jumping between two integers at the end of training.

A weight whose best value lies between two grid points is pushed across the boundary again and
again; batch statistics and other weights adapt to a value that the next step takes back (Nagel et
al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022). Their dampening pulls
each weight to the point that it rounds to: `sum (Q(w) - clip(w))^2`, `Q(w)` held constant.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mpq.numerics import fake_quantize, per_axis
from mpq.quant.layer import QuantLayer

WIDEST = 4
"""Bits up to which weights are dampened: finer grids do not notice a jump."""


def dampening(model: nn.Module) -> Tensor:
    """`sum (Q(w) - clip(w))^2` over all weights of at most 4 bits; a scalar, 0 without any."""
    total = torch.zeros(())
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and layer.spec.bits <= WIDEST:
            total = total.to(layer.weight.device) + _distance(layer)
    return total


def strength(progress: float) -> float:
    """How much of the dampening is on: from 0 to 1 over the run, half a cosine."""
    return (1 - math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


def _distance(layer: QuantLayer) -> Tensor:
    weight, spec, axis = layer.weight, layer.spec, layer.op.axis
    step = layer.step().detach()
    point = fake_quantize(weight.detach(), step, torch.zeros_like(step), spec, axis)
    s = per_axis(step, weight.ndim, axis)
    clipped = torch.clamp(weight, spec.qmin * s, spec.qmax * s)
    return (point - clipped).square().sum()
