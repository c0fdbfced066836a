"""`FakeQuant`: the activation quantizer of a prepared graph, and its frozen form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mpq.numerics import TINY, choose_qparams
from mpq.quant import ops
from mpq.quant.lsq import learned_fake_quantize
from mpq.spec import QuantSpec


class FakeQuant(nn.Module):
    """Per-tensor activation quantizer with a learned step and a fixed zero point.

    In training mode the step learns (LSQ); in eval mode the operator of the frozen graph runs, so
    freezing changes no bit. With `enabled` off it only does what it absorbed (calibration).

    Args:
        spec: unsigned format.
        ceiling: an absorbed ReLU6: the range never exceeds it, so saturation is the clip.

    Attributes:
        goal: the policy's format; `spec` is wider while training lowers it in stages.
    """

    zero_point: Tensor

    def __init__(self, spec: QuantSpec, ceiling: float | None = None) -> None:
        super().__init__()
        self.spec, self.ceiling = spec, ceiling
        self.goal = spec
        self.enabled = True
        self.scale = nn.Parameter(torch.tensor(1.0 / spec.qmax))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Take scale and zero point from an observed range."""
        if self.ceiling is not None:
            high = high.clamp(max=self.ceiling)
        scale, zero = choose_qparams(low, high, self.spec)
        with torch.no_grad():
            self.scale.copy_(scale)
            self.zero_point.copy_(zero)

    def step(self) -> Tensor:
        """The effective scale: positive, and within the ceiling."""
        scale = self.scale.abs().clamp(min=TINY)
        return scale if self.ceiling is None else scale.clamp(max=self.ceiling / self.spec.qmax)

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the grid."""
        if not self.enabled:
            return x if self.ceiling is None else x.clamp(max=self.ceiling)
        if not self.training:
            scale = self.step().detach()
            return ops.fake_quantize(x, scale, self.zero_point, self.spec.qmin, self.spec.qmax)
        count = x.numel() // max(x.shape[0], 1)
        return learned_fake_quantize(
            x, self.step(), self.zero_point, self.spec, axis=0, count=count
        )

    def frozen(self) -> FrozenQuant:
        """This quantizer as constants."""
        return FrozenQuant(self)

    def extra_repr(self) -> str:
        """The format, for `print(module)`."""
        return str(self.spec)


class FrozenQuant(nn.Module):
    """A `FakeQuant` as constants: `scale` float32 `[]`, `zero_point` uint8 or uint16 `[]`."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: FakeQuant) -> None:
        super().__init__()
        self.spec = quantizer.spec
        self.register_buffer("scale", quantizer.step().detach().clone())
        stored = torch.uint16 if self.spec.bits > 8 else torch.uint8
        self.register_buffer("zero_point", quantizer.zero_point.to(stored))

    def forward(self, x: Tensor) -> Tensor:
        """Round `x` to the grid."""
        return ops.fake_quantize(x, self.scale, self.zero_point, self.spec.qmin, self.spec.qmax)
