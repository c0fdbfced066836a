"""`LiveNorm`: batch normalization that stays alive after a quantized layer while it trains.

With one weight step `s_c` per output channel, scaling a channel commutes with rounding it: for any
`f_c > 0`, quantizing `f_c w` with the step `f_c s_c` gives the integers of quantizing `w` with
`s_c`. So a layer may train as `norm(conv(x, Q(w)))`, with the statistics of the batch and rates
that suit a normalized network, and still be one integer layer of scale `f_c s_c` and bias
`beta_c - mean_c f_c`, `f_c = gamma_c / sqrt(var_c + eps)`, whenever it is evaluated: no second
convolution and no correction, which folding before rounding needs (Krishnamoorthi, "Quantizing
deep convolutional networks for efficient inference", 2018, section 3.2.2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.numerics import TINY

EPS = 1e-5
MOMENTUM = 0.1


class LiveNorm(nn.Module):
    """Per-channel normalization over dimension 1.

    Args:
        mean: running mean `[C]` of what is normalized.
        var: running variance `[C]`.
        factor: `f > 0`, `[C]`: `weight` is chosen so that `factor()` gives it.
        beta: `[C]`.

    Attributes:
        frozen: normalize by the running statistics in training too.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, mean: Tensor, var: Tensor, factor: Tensor, beta: Tensor) -> None:
        super().__init__()
        self.frozen = False
        self.weight = nn.Parameter(factor * (var + EPS).sqrt())
        self.bias = nn.Parameter(beta.clone())
        self.register_buffer("running_mean", mean.clone())
        self.register_buffer("running_var", var.clone())

    def factor(self) -> Tensor:
        """`f` `[C]`, positive: what a channel is multiplied by in eval mode."""
        return (self.weight.abs() / (self.running_var + EPS).sqrt()).clamp(min=TINY)

    def affine(self) -> tuple[Tensor, Tensor]:
        """`factor()`, and what is added to a channel in eval mode `[C]`."""
        factor = self.factor()
        return factor, self.bias - self.running_mean * factor

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `[B, C, ...]`; in training by the batch, unless frozen."""
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight.abs(),
            self.bias,
            training=self.training and not self.frozen,
            momentum=MOMENTUM,
            eps=EPS,
        )


@torch.no_grad()
def unfold_norm(mean: Tensor, var: Tensor, bias: Tensor, factor: Tensor) -> tuple[Tensor, LiveNorm]:
    """A norm that follows a folded layer, such that nothing changes in eval mode.

    Args:
        mean: of the folded layer's output, `[C]`.
        var: of the same.
        bias: the folded layer's.
        factor: what folding multiplied each channel by, of any sign; its size is undone.

    Returns:
        What to divide weights and steps by `[C]`, and the norm.
    """
    size = factor.abs()
    divisor = torch.maximum(size, size.median() * 1e-3).clamp(min=TINY)
    inner = mean - bias
    return divisor, LiveNorm(inner / divisor, var / divisor**2, divisor, bias + inner)
