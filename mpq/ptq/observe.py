"""Activation ranges: watch each quantizer's input on calibration images, then choose a range.

`minmax` takes the extremes, `percentile` leaves out the outermost 0.01 % of the values at each end,
`mse` takes the range whose quantization error over the observed histogram is least, and `kl` the
one whose quantized histogram has the least Kullback-Leibler divergence (Migacz, "8-bit inference
with TensorRT", 2017).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, fx, nn

from mpq.calls import Inputs, call, count, split
from mpq.errors import GraphError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.hooks import hooked
from mpq.numerics import choose_qparams, fake_quantize
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.quant.ranges import STOP_RATIO, best_ratio
from mpq.spec import QuantSpec

Method = Literal["minmax", "percentile", "mse", "kl"]
METHODS: tuple[str, ...] = get_args(Method)
BINS = 2048
MAX_VALUES = 2**23
"""Values of a tensor that are counted, about: of larger ones every n-th, n odd."""
PERCENTILE = 1e-4
RATIOS = tuple(round(1.0 - 0.01 * i, 2) for i in range(81))
Progress = Callable[[int, int], None]


@dataclass
class Histogram:
    """Counts of a tensor's values over `BINS` equal bins between its extremes."""

    low: float = 0.0
    high: float = 0.0
    seen: int = 0
    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))

    def widen(self, x: Tensor) -> None:
        """First pass: the extremes, which are finite only if every value is.

        Raises:
            ValueError: a value is not.
        """
        low, high = (float(v) for v in torch.aminmax(x))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN or infinity")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self.seen += x.numel()

    def count(self, x: Tensor) -> None:
        """Second pass: the counts."""
        width = max(self.high - self.low, 1e-30)
        step = self.seen // MAX_VALUES | 1  # odd: it walks through all channels and positions
        x = x.flatten()[::step]
        self.counts += torch.histc(x.float(), BINS, self.low, self.low + width).double().cpu()

    @property
    def centers(self) -> Tensor:
        """Middle of each bin."""
        width = (self.high - self.low) / BINS
        return self.low + width * (torch.arange(BINS) + 0.5)


Look = Callable[[Histogram, Tensor], None]


@torch.no_grad()
def calibrate(
    qg: QuantGraph,
    images: Inputs,
    *,
    method: Method = "mse",
    batch: int = 128,
    progress: Progress | None = None,
) -> int:
    """Set the range of every activation quantizer of a prepared graph, in place.

    Args:
        qg: a graph in stage `prepared`.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`); a few hundred suffice.
        method: how to choose a range.
        batch: images at a time.
        progress: called with (batches done, batches in all).

    Returns:
        The number of quantizers.

    Raises:
        UsageError: an unknown method, or no images.
        GraphError: the graph is not prepared, or an activation is not finite.
    """
    looks = _looks(method)
    qg.require("prepared", "calibration")
    if not count(images):
        raise UsageError("calibration needs at least one image. Got none.")
    sites = {n: m for n, m in qg.module.named_modules() if isinstance(m, FakeQuant)}
    histograms = {name: Histogram() for name in sites}
    parts = split(images, batch)
    done, total = 0, len(looks) * len(parts)
    qg.module.eval()
    with switched_off(qg.module):
        for look in looks:
            watches = [(m, partial(_look, n, histograms[n], look)) for n, m in sites.items()]
            with hooked(m.register_forward_pre_hook(hook) for m, hook in watches):
                for part in parts:
                    call(qg.module, part)
                    done += 1
                    if progress:
                        progress(done, total)
    for name, quantizer in sites.items():
        _take_range(histograms[name], quantizer, method)
    return len(sites)


@contextmanager
def switched_off(module: nn.Module) -> Iterator[None]:
    """All quantizers of a module pass floats through inside the block."""
    parts = [m for m in module.modules() if isinstance(m, (FakeQuant, QuantLayer))]
    for part in parts:
        part.enabled = False
    try:
        yield
    finally:
        for part in parts:
            part.enabled = True


def _looks(method: Method) -> tuple[Look, ...]:
    """What is done with all batches, one after the other."""
    if method not in METHODS:
        raise UsageError(f"calibration must be one of {', '.join(METHODS)}. Got {method!r}.")
    return (Histogram.widen,) if method == "minmax" else (Histogram.widen, Histogram.count)


def all_at_nodes(module: fx.GraphModule) -> bool:
    """Whether each quantizer is a node of its own: none lies inside a module that is not traced."""
    called = Counter(str(n.target) for n in module.graph.nodes if n.op == "call_module")
    sites = (name for name, m in module.named_modules() if isinstance(m, FakeQuant))
    return all(called[name] == 1 for name in sites)


def set_range(
    name: str, quantizer: FakeQuant, seen: Callable[[], Iterable[Tensor]], method: Method
) -> None:
    """Set the range of one quantizer by its float inputs, which `seen` gives batch by batch."""
    histogram = Histogram()
    for look in _looks(method):
        for x in seen():
            _look(name, histogram, look, quantizer, (x,))
    _take_range(histogram, quantizer, method)


def _take_range(histogram: Histogram, quantizer: FakeQuant, method: Method) -> None:
    quantizer.set_range(*map(torch.tensor, choose_range(histogram, quantizer.spec, method)))


def _look(
    name: str, histogram: Histogram, look: Look, module: nn.Module, args: tuple[Tensor, ...]
) -> None:
    x = args[0]
    assert isinstance(module, FakeQuant)
    try:
        look(histogram, x if module.ceiling is None else x.clamp(max=module.ceiling))
    except ValueError as error:
        raise GraphError(
            f"the input of {name} must be finite but holds {error}. "
            "Check the weights of the layer before it and the normalization of the images."
        ) from None


def choose_range(histogram: Histogram, spec: QuantSpec, method: Method) -> tuple[float, float]:
    """The range (low <= 0 <= high) for one quantizer."""
    low, high = histogram.low, histogram.high
    if method == "minmax" or high <= low:
        return low, high
    if method == "percentile":
        share = histogram.counts.cumsum(0) / histogram.counts.sum()
        centers = histogram.centers
        first = int((share > PERCENTILE).nonzero()[0])
        last = int((share >= 1 - PERCENTILE).nonzero()[0])
        return (float(centers[first]) if low < 0 else low), float(centers[last])
    score = _squared_error if method == "mse" else _divergence
    stop = STOP_RATIO if method == "mse" else math.inf  # a divergence goes up and down
    ratio = best_ratio(lambda r: score(histogram, low * r, high * r, spec), RATIOS, stop_ratio=stop)
    best = float(ratio)
    found, pixels = (low * best, high * best), (0.0, 1.0)
    if method == "mse" and low == 0.0 and high <= 1.0:  # whole 255ths, whichever of them are seen
        return min(found, pixels, key=lambda r: float(score(histogram, r[0], r[1], spec)))
    return found


def _squared_error(histogram: Histogram, low: float, high: float, spec: QuantSpec) -> Tensor:
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    x = histogram.centers
    error = (fake_quantize(x, scale, zero, spec) - x).double().pow(2)
    return (error * histogram.counts).sum()


def _divergence(histogram: Histogram, low: float, high: float, spec: QuantSpec) -> Tensor:
    """KL(p || q): p the clipped histogram, q the same spread evenly over each step's bins."""
    x, counts = histogram.centers, histogram.counts
    inside = x.clamp(low, high)
    index = ((inside - histogram.low) / (histogram.high - histogram.low) * BINS).long()
    p = torch.zeros_like(counts).index_add_(0, index.clamp(0, BINS - 1), counts)
    used = (x >= low) & (x <= high)
    scale, zero = choose_qparams(torch.tensor(low), torch.tensor(high), spec)
    level = (torch.round(x / scale) + zero).clamp(spec.qmin, spec.qmax).long() - spec.qmin
    alive = used & (counts > 0)
    size = spec.qmax - spec.qmin + 1
    mass = torch.zeros(size, dtype=torch.float64).index_add_(0, level[used], counts[used])
    bins = torch.zeros(size, dtype=torch.float64).index_add_(0, level[alive], counts[alive] * 0 + 1)
    q = torch.where(alive, mass[level] / bins[level].clamp(min=1), 0.0)
    p, q = p / p.sum(), q / q.sum().clamp(min=1e-30)
    return (p * ((p + 1e-12) / (q + 1e-12)).log())[p > 0].sum()
