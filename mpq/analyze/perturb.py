"""What quantization would do to each tensor: the perturbations that all metrics score.

Weights: `dW = Q_b(W) - W`, rounded to the nearest with scales of least squared error, or with
`feedback` as `mpq ptq` does: scales by the error of the layer's output, and each column makes up
for those before it (`quant.rounding`). The second makes errors five to thirty times smaller, not
alike in all layers. Activations: the quantizers
that `prepare` places for an all-8-bit policy, ranges from the first images; a layer's
activation is the tensor whose grid it reads. Quantizers that no layer reads cost the same under
every policy and are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor, nn

from mpq.analyze.sensitivity import Part
from mpq.analyze.watch import Watch, require_finite
from mpq.calls import Inputs, call, count, leaves, split, take
from mpq.errors import GraphError
from mpq.graph.annotate import annotate
from mpq.graph.ir import QuantGraph
from mpq.hooks import hooked
from mpq.numerics import choose_qparams, fake_quantize, sqnr_db
from mpq.policy import Policy
from mpq.quant.operation import LayerOp
from mpq.quant.ranges import SEARCHED, activation_range, weight_scales
from mpq.quant.rounding import (
    Gram,
    grouped,
    input_vectors,
    output_error,
    round_rows,
    scales_by_output,
)
from mpq.spec import QuantSpec, activation_spec, weight_spec

Column = tuple[str, Part, int]
"""A candidate: layer, part, bits."""

Rounding = Literal["feedback", "nearest"]
RANGE_IMAGES, MOMENT_IMAGES = 128, 64
"""Images that activation ranges, and that second moments of inputs, are taken from."""
MOMENT_COLUMNS = 4096
"""About how many input vectors of a layer its second moment is taken from."""
MAX_ROWS = 2304
"""Weights per output up to which a layer is rounded with feedback (its moments are the square)."""
RANGE_VALUES = 100_000
"""Values of a tensor that a range search looks at."""


@dataclass(frozen=True, slots=True)
class Grid:
    """An activation quantizer with its range."""

    scale: Tensor
    zero: Tensor
    spec: QuantSpec
    sqnr: float

    def noise(self, x: Tensor) -> Tensor:
        """`Q(x) - x`."""
        return fake_quantize(x, self.scale, self.zero, self.spec) - x


@dataclass(frozen=True)
class Perturbations:
    """All candidates of a network.

    Args:
        graph: a private copy in stage `float`, without in-place operations, in eval mode and
            without gradients to weights; metrics may hook into it and change it.
        weights: `dW` per layer and width.
        grids: activation quantizers per tensor and width; a tensor is the name of a graph node, or
            the path of a layer inside a module that cannot be traced (its input).
        readers: layers that read each of those tensors.
    """

    graph: QuantGraph
    weights: dict[tuple[str, int], Tensor]
    grids: dict[tuple[str, int], Grid]
    readers: dict[str, tuple[str, ...]]

    @cached_property
    def _tensors(self) -> dict[str, str]:
        return {name: tensor for tensor, names in self.readers.items() for name in names}

    def tensor_of(self, layer: str) -> str | None:
        """The tensor that a layer reads quantized, None if it computes in float."""
        return self._tensors.get(layer)

    def weight(self, layer: str) -> Tensor:
        """The float weights of a layer."""
        return module_weight(self.graph.module, layer)

    def sqnr(self, column: Column) -> float | None:
        """SQNR in dB of a candidate, None where there is no noise or nothing was seen."""
        layer, part, bits = column
        if part == "activation":
            tensor = self.tensor_of(layer)
            grid = None if tensor is None else self.grids.get((tensor, bits))
            value = float("inf") if grid is None else grid.sqnr
        else:
            weight = self.weight(layer)
            value = sqnr_db(weight, weight + self.weights[layer, bits])
        return None if value in (float("inf"), float("-inf")) else value


def module_weight(module: nn.Module, layer: str) -> Tensor:
    """The weight tensor of a layer, detached."""
    return parameter(module, layer).detach()


def parameter(module: nn.Module, layer: str) -> Tensor:
    """The weight tensor of a layer, as gradients reach it."""
    weight = module.get_submodule(layer).weight
    assert isinstance(weight, Tensor)
    return weight


def perturb(
    qg: QuantGraph,
    images: Inputs | None,
    *,
    weight_bits: Sequence[int],
    activation_bits: Sequence[int],
    rounding: Rounding = "nearest",
    batch: int = 64,
) -> Perturbations:
    """Quantize every tensor of a float graph at every width, on paper.

    Args:
        qg: a graph in stage `float`; it is not changed.
        images: `[N, C, H, W]`, normalised, or inputs (`mpq.calls`); None scores weights only.
        weight_bits: widths to try on weights.
        activation_bits: widths to try on activations; 16 bits are taken as exact.
        rounding: of weights of 6 bits and fewer: `feedback` as `mpq ptq` does, `nearest` without
            a look at the inputs, as is done where there are no images or a layer is too large.
        batch: images per forward pass.

    Raises:
        GraphError: the graph is in another stage; a layer has weights that are not finite.
        DataError: an activation is not finite.
    """
    if qg.stage != "float":
        raise GraphError(f"analysis needs a graph in stage 'float'. Got {qg.stage!r} instead.")
    graph = _private_copy(qg)
    if images is not None:
        graph.module.to(next(iter(leaves(images).values())).device)
    moments = {}
    if images is not None and rounding == "feedback" and min(weight_bits) <= SEARCHED:
        moments = _second_moments(graph, take(images, slice(MOMENT_IMAGES)), batch)
    weights = {
        (n, b): _weight_noise(graph, n, b, moments.get(n))
        for n in graph.layers
        for b in weight_bits
    }
    readers = _readers(graph)
    widths = [b for b in activation_bits if b <= 8]
    grids: dict[tuple[str, int], Grid] = {}
    if images is not None and widths:
        first = take(images, slice(RANGE_IMAGES))
        for tensor, values in _observe(graph, readers, first, batch).items():
            grids |= {(tensor, b): _grid(values, activation_spec(b)) for b in widths}
    return Perturbations(graph, weights, grids, readers)


def _private_copy(qg: QuantGraph) -> QuantGraph:
    graph = qg.copy()
    graph.module.eval().requires_grad_(False)
    for module in graph.module.modules():
        if getattr(module, "inplace", False):  # inside modules that are kept as they are
            module.inplace = False  # type: ignore[assignment]
    return graph


def _weight_noise(graph: QuantGraph, name: str, bits: int, moment: Tensor | None) -> Tensor:
    weight, spec = module_weight(graph.module, name), weight_spec(bits)
    if not bool(torch.isfinite(weight).all()):
        raise GraphError(
            f"the weights of layer {name} must be finite but hold NaN or infinity. "
            "The checkpoint is damaged or its training diverged."
        )
    op = LayerOp.of(graph.module.get_submodule(name))
    if moment is not None and bits <= SEARCHED:
        rows = grouped(op, weight.cpu())
        steps = scales_by_output(rows, partial(output_error, h=moment), spec)
        integers = round_rows(rows, steps, moment, spec)
        return (integers * steps[..., None]).reshape(weight.shape).to(weight.device) - weight
    scale = weight_scales(weight, spec, op.axis)
    zero = torch.zeros_like(scale)
    return fake_quantize(weight, scale, zero, spec, op.axis) - weight


@torch.no_grad()
def _second_moments(graph: QuantGraph, images: Inputs, batch: int) -> dict[str, Tensor]:
    """`X X'` `[G, K, K]` of the inputs of every layer that is a matrix product of moderate size."""
    found: dict[str, Gram] = {}
    places: list[tuple[str, nn.Module]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        info = graph.layers[name]

        def look(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
            op, weight = LayerOp.of(module), module_weight(graph.module, name)
            positions = info.out_elements // info.out_channels * count(images)
            thin = max(1, math.isqrt(positions // MOMENT_COLUMNS))
            vectors = input_vectors(op, weight, args[0], thin=thin).float().cpu()
            found.setdefault(name, Gram(*vectors.shape[:2])).add(vectors)

        return look

    for name in graph.layers:
        module = graph.module.get_submodule(name)
        weight = module_weight(graph.module, name)
        rows = weight.shape[1:].numel()
        if LayerOp.of(module).kind != "conv_transpose" and weight.ndim <= 4 and rows <= MAX_ROWS:
            places.append((name, module))
    with hooked(module.register_forward_hook(hook(name)) for name, module in places):
        for part in split(images, batch):
            call(graph.module, part)
    return {n: m.quantized for n, m in found.items() if bool(m.quantized.isfinite().all())}


def _readers(graph: QuantGraph) -> dict[str, tuple[str, ...]]:
    """Layers by the tensor whose grid they read, of an all-8-bit policy."""
    annotate(graph, Policy.uniform(8))
    nodes = {site.name: site.node for site in graph.sites.values()}
    found: dict[str, tuple[str, ...]] = {}
    for name, plan in graph.plans.items():
        if not plan.support.integer:
            continue  # computes in float even at 8 bits: its input keeps its precision
        tensor = name if plan.site is None else nodes[plan.site]
        found[tensor] = (*found.get(tensor, ()), name)
    return found


def _observe(
    graph: QuantGraph, readers: dict[str, tuple[str, ...]], images: Inputs, batch: int
) -> dict[str, Tensor]:
    """A sample of each tensor's values, its extremes included."""
    found: dict[str, list[Tensor]] = {name: [] for name in readers}
    quota = max(RANGE_VALUES * batch // max(count(images), 1), 1000)

    def see(name: str, x: Tensor) -> Tensor:
        low, high = torch.aminmax(x)
        step = max(x.numel() // quota, 1)
        # An odd step walks through all channels and positions of a tensor of even sizes.
        sampled = x.flatten()[:: step | 1].float().clone()  # a view would keep the whole tensor
        found[name] += [sampled, torch.stack((low, high)).float()]
        return x

    watch = Watch(graph, list(readers), see)
    with torch.no_grad():
        for part in split(images, batch):
            watch.answer(part)
    joined = {name: torch.cat(values) for name, values in found.items() if values}
    for name, values in joined.items():
        require_finite(values, graph, images, otherwise=readers[name][0])
    return joined


def _grid(values: Tensor, spec: QuantSpec) -> Grid:
    scale, zero = choose_qparams(*activation_range(values, spec), spec)
    sqnr = sqnr_db(values, fake_quantize(values, scale, zero, spec))
    return Grid(scale, zero, spec, sqnr)
