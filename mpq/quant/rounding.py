"""Choose integer weights for one layer so that its output, not its weights, changes least.

The output error of a row `w` on inputs with second moment `H = X X^T / n` is `(w - q)^T H (w - q)`.
Scales are chosen by that error over a grid of clipping ratios. Rounding is sequential: each column
is rounded to nearest and the rest of the row is moved to make up for it, in the order and with the
factors of the Cholesky factor of `H^-1` (Frantar et al., "OPTQ: Accurate Quantization for
Generative Pre-trained Transformers", 2023). If the layer's input in the quantized network
(`X_q`) differs from the one in the float network (`X`), the target is the least-squares weight
`W X X_q^T (X_q X_q^T)^-1` (as in Lybrand and Saab, "A Greedy Algorithm for Quantizing Neural
Networks", 2021, the error of earlier layers is then made up for too).

Weights have shape `[G, O, K]`: groups, outputs per group, inputs per group.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.numerics import choose_qparams
from mpq.quant.operation import LayerOp
from mpq.quant.ranges import best_ratio
from mpq.spec import QuantSpec

DAMPING = 0.01
"""Share of H's mean diagonal that is added to it: keeps the inverse tame."""
PULL = 0.05
"""The same for the least-squares target, which follows noise in H more readily."""
BLOCK = 128
"""Columns that are rounded before the rest of the matrix hears of it."""
SWEEPS = 3
"""Rounds of coordinate descent; later ones change next to nothing."""
MAX_COLUMNS = 16384
"""About how many input vectors of a layer are looked at; more hardly change the result."""


class Gram:
    """Accumulated products of a layer's input vectors: `H` of the output error, unscaled.

    As long as there are fewer vectors than inputs they are kept as they are: a classifier over
    25,088 features that has seen 64 images needs no matrix of 25,088 x 25,088.

    Args:
        groups: G.
        size: K, inputs per group.
    """

    def __init__(self, groups: int, size: int) -> None:
        self._shape = (groups, size, size)
        self._few: list[tuple[Tensor, Tensor | None]] = []
        self._sums: tuple[Tensor, Tensor] | None = None
        self.count = 0

    def add(self, x_q: Tensor, x: Tensor | None = None) -> None:
        """Add vectors `[G, K, P]` of the quantized network and, where `cross` counts, the float."""
        self.count += x_q.shape[-1]
        self._few.append((x_q, x))
        if self.count >= self._shape[1]:
            self._sum()

    @property
    def quantized(self) -> Tensor:
        """`X_q X_q^T`, `[G, K, K]`."""
        return self._sum()[0]

    @property
    def cross(self) -> Tensor:
        """`X X_q^T`, `[G, K, K]`, of all vectors that came in pairs."""
        return self._sum()[1]

    def error(self, off: Tensor) -> Tensor:
        """`output_error(off, self.quantized)`, in the cheaper of two ways."""
        if self._sums is not None:
            return output_error(off, self.quantized)
        costs = [(off @ x_q).square().sum(-1) for x_q, _ in self._few]
        return torch.stack(costs).sum(0) if costs else off.new_zeros(off.shape[:2])

    def _sum(self) -> tuple[Tensor, Tensor]:
        if self._sums is None:
            self._sums = torch.zeros(self._shape), torch.zeros(self._shape)
        for x_q, x in self._few:
            self._sums[0].add_(x_q @ x_q.transpose(1, 2))
            if x is not None:
                self._sums[1].add_(x @ x_q.transpose(1, 2))
        self._few.clear()
        return self._sums


def input_vectors(op: LayerOp, weight: Tensor, x: Tensor, *, thin: int) -> Tensor:
    """The vectors that a layer multiplies its weights with: `[G, K, P]`.

    Of the positions of a convolution every `thin`-th is taken in each direction, of the rows of a
    matrix product every `thin ** 2`-th.
    """
    if op.kind == "linear":
        return x.reshape(-1, x.shape[-1])[:: thin * thin].T.unsqueeze(0)
    x = F.pad(x, [p for size in reversed(op.padding) for p in (size, size)]).transpose(0, 1)
    taps = []
    for offset in itertools.product(*(range(k) for k in weight.shape[2:])):
        window = [slice(None), slice(None)]
        for axis, o in enumerate(offset):
            start, step = o * op.dilation[axis], op.stride[axis] * thin
            reach = op.dilation[axis] * (weight.shape[2 + axis] - 1 - o)
            window.append(slice(start, x.shape[2 + axis] - reach, step))
        taps.append(x[tuple(window)])
    columns = torch.stack(taps, dim=1)  # [C, taps, N, *positions]
    return columns.reshape(op.groups, columns.shape[0] // op.groups * len(taps), -1)


def grouped(op: LayerOp, weight: Tensor) -> Tensor:
    """Weights as `[G, O, K]`."""
    groups = op.groups if op.kind == "conv" else 1
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def nearest(w: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """Integers `[G, O, K]` by rounding to nearest."""
    return torch.round(w / scale[..., None]).clamp(spec.qmin, spec.qmax)


def output_error(off: Tensor, h: Tensor) -> Tensor:
    """`off H off^T` of every row of weights that are off by `[G, O, K]`: `[G, O]`."""
    return (off @ h * off).sum(-1)


def scales_by_output(w: Tensor, error: Callable[[Tensor], Tensor], spec: QuantSpec) -> Tensor:
    """Per-row scales `[G, O]` with the least output error among clipping ratios.

    Args:
        w: `[G, O, K]`.
        error: what weights that are off by `[G, O, K]` cost each row, `[G, O]`.
        spec: the format.
    """
    scale, _ = choose_qparams(w.amin(-1), w.amax(-1), spec)

    def at(ratio: float) -> Tensor:
        steps = scale * ratio
        return error(nearest(w, steps, spec) * steps[..., None] - w)

    return scale * best_ratio(at)


def target_weights(w: Tensor, gram: Gram) -> Tensor:
    """The weights that reproduce the float output best on the quantized input."""
    h = _damped(gram.quantized, PULL)
    # W X Xq^T + pull * W, times (Xq Xq^T + pull)^-1: exact when both inputs agree.
    rhs = w @ (gram.cross + (h - gram.quantized))
    solved: Tensor = torch.linalg.solve(h, rhs, left=False)
    return solved


def round_rows(w: Tensor, scale: Tensor, h: Tensor, spec: QuantSpec) -> Tensor:
    """Integers `[G, O, K]`: of each row the better of sequential rounding and nearest.

    The scale of a row was chosen for rounding to nearest, which now and then is hard to beat.
    """
    found, plain = sequential(w, scale, h, spec), nearest(w, scale, spec)
    errors = [output_error(q * scale[..., None] - w, h) for q in (found, plain)]
    better = errors[0] <= errors[1]
    return torch.where(better[..., None], found, plain)


def sequential(w: Tensor, scale: Tensor, h: Tensor, spec: QuantSpec) -> Tensor:
    """Integers `[G, O, K]` by rounding column after column with error feedback.

    The feedback to columns beyond the next `BLOCK` is gathered and applied in one product.
    """
    order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)  # what matters most first
    h = h.take_along_dim(order[:, :, None], 1).take_along_dim(order[:, None, :], 2)
    work = w.take_along_dim(order[:, None, :], 2)
    # In float64: with fewer input vectors than inputs, float32 loses the sign of small pivots.
    inverse = torch.linalg.inv(_damped(h.double(), DAMPING))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    q, error = torch.empty_like(work), torch.empty_like(work)
    for start in range(0, w.shape[2], BLOCK):
        stop = min(start + BLOCK, w.shape[2])
        for j in range(start, stop):
            column, rest = work[:, :, j], slice(j + 1, stop)
            q[:, :, j] = torch.round(column / scale).clamp(spec.qmin, spec.qmax)
            error[:, :, j] = (column - q[:, :, j] * scale) / upper[:, None, j, j]
            work[:, :, rest] -= error[:, :, j, None] * upper[:, None, j, rest]
        block = slice(start, stop)
        work[:, :, stop:] -= error[:, :, block] @ upper[:, block, stop:]
    return q.take_along_dim(order.argsort(dim=1)[:, None, :], 2)


def refine(
    w: Tensor, q: Tensor, scale: Tensor, h: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor]:
    """Better integers and scales by descent on the output error, one coordinate at a time.

    With `d = q s - w` a single weight is best at `d_j - (d H)_j / H_jj`, which is rounded to the
    grid; a scale is best at `s = q H w / q H q`. Each step lowers the error or leaves it
    (coordinate descent after Behdin et al., "QuantEase: Optimization-based Quantization for
    Language Models", 2023).

    Returns:
        Integers `[G, O, K]` and scales `[G, O]`.
    """
    h = _damped(h, DAMPING)
    order = h.diagonal(dim1=1, dim2=2).mean(0).argsort(descending=True).tolist()
    q = q.clone()
    for _ in range(SWEEPS):
        against = q @ h
        up, down = (against * w).sum(-1), (against * q).sum(-1)
        scale = torch.where((up > 0) & (down > 0), up / down.clamp(min=1e-30), scale)
        pull = (q * scale[..., None] - w) @ h
        for j in order:
            row = h[:, j]  # [G, K]
            wish = q[:, :, j] - pull[:, :, j] / (row[:, None, j] * scale)
            wish = wish.round().clamp(spec.qmin, spec.qmax)
            pull += ((wish - q[:, :, j]) * scale)[..., None] * row[:, None]
            q[:, :, j] = wish
    return q, scale


def _damped(h: Tensor, share: float) -> Tensor:
    mean = h.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    return h + share * mean[:, None, None] * torch.eye(h.shape[-1], dtype=h.dtype)
