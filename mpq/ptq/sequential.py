"""Quantize layer after layer in one walk over the graph, float and quantized network in lock step.

At each layer the inputs of both networks are at hand: the integer weights are chosen on the
quantized input against the float output, then the bias takes up what is left of the mean error
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
section 4.2, here with measured means). Later layers see the quantized network as it then is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from mpq.errors import GraphError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.ptq.observe import switched_off
from mpq.ptq.rounding import (
    MAX_COLUMNS,
    Moments,
    grouped,
    input_vectors,
    round_rows,
    scales_by_output,
    target_weights,
)
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer

Progress = Callable[[int, int], None]
QUANTIZED, FLOAT = 0, 1


@torch.no_grad()
def quantize_layers(
    qg: QuantGraph,
    images: Tensor,
    *,
    batch: int = 128,
    learn_rounding: bool = True,
    correct_bias: bool = True,
    progress: Progress | None = None,
) -> int:
    """Set scales, weights and biases of every quantized layer of a calibrated graph, in place.

    Args:
        qg: a graph in stage `prepared` whose activation ranges are set.
        images: normalized `[N, C, H, W]`.
        batch: images at a time.
        learn_rounding: sequential rounding with error feedback; off, rounding to nearest.
        correct_bias: make up for the mean error of each output channel.
        progress: told (layers done, layers in all).

    Returns:
        The number of layers quantized.

    Raises:
        GraphError: the graph is not prepared.
        UsageError: no images.
    """
    if qg.stage != "prepared":
        raise GraphError(f"this needs a prepared graph. Got stage {qg.stage!r}.")
    if len(images) == 0:
        raise UsageError("quantizing layers needs at least one image. Got none.")
    qg.module.eval()
    seen: set[int] = set()
    for module in qg.module.modules():  # those inside islands included
        if isinstance(module, QuantLayer):
            _unshare(module, seen)
            module.scale.copy_(torch.maximum(module.scale, _scale_floor(module)))
    walk = _LockStep(qg.module, torch.split(images, batch))
    total = sum(walk.layer(node) is not None for node in qg.module.graph.nodes)
    done = 0
    for node in qg.module.graph.nodes:
        layer = walk.layer(node)
        wanted = walk.evaluate(node, FLOAT)
        if layer is not None:
            x_q, x = walk.inputs(node)
            if _solvable(layer):
                _choose_integers(layer, x_q, x, learn_rounding)
            if correct_bias:
                _correct_bias(layer, x_q, wanted)
            done += 1
            if progress:
                progress(done, total)
        walk.keep(node, walk.evaluate(node, QUANTIZED), wanted)
    return done


def _unshare(layer: QuantLayer, seen: set[int]) -> None:
    """Give the second call of a shared module parameters of its own: its inputs are others."""
    for name in ("weight", "bias"):
        value: nn.Parameter | None = getattr(layer, name)
        if value is not None and id(value) in seen:
            setattr(layer, name, nn.Parameter(value.detach().clone()))
        seen.add(id(value))


def _solvable(layer: QuantLayer) -> bool:
    """Whether the layer is a matrix product over input vectors at a width where rounding counts."""
    return layer.op.kind != "conv_transpose" and layer.spec.bits <= 8 and layer.weight.ndim <= 4


def _scale_floor(layer: QuantLayer) -> Tensor:
    """Least scales with which the integer bias stays below 2^30, shaped like the layer's scales.

    A channel whose weights are next to nothing (a batch norm may end so) still has its bias.
    """
    if layer.bias is None or layer.source is None:
        return torch.zeros_like(layer.scale)
    floor = layer.bias.detach().abs() / (layer.source.step() * 2.0**30)
    return floor if layer.scale.ndim else floor.amax()


def _correct_bias(layer: QuantLayer, x_q: list[Tensor], wanted: list[Any]) -> None:
    """Add the mean of what the float layer gives over what this one gives, per output channel."""
    if layer.bias is None:
        return
    error, count = torch.zeros_like(layer.bias), 0
    for part, target in zip(x_q, wanted, strict=True):
        difference = target - layer(part)
        channel = difference.ndim - 1 if layer.op.kind == "linear" else 1
        error.add_(difference.transpose(0, channel).flatten(1).sum(1))
        count += difference.numel() // difference.shape[channel]
    layer.bias.add_(error / count)


def _choose_integers(
    layer: QuantLayer, x_q: list[Tensor], x: list[Tensor], learn_rounding: bool
) -> None:
    w = grouped(layer.op, layer.weight.detach())
    moments = Moments.empty(w.shape[0], w.shape[2])
    total = sum(p.shape[0] * _positions(layer, p) for p in x_q)
    thin = max(1, math.isqrt(total // MAX_COLUMNS))
    for part_q, part in zip(x_q, x, strict=True):
        moments.add(
            input_vectors(layer.op, layer.weight, part_q, thin=thin),
            input_vectors(layer.op, layer.weight, part, thin=thin),
        )
    wanted = target_weights(w, moments) if learn_rounding else w
    scale = scales_by_output(wanted, moments.quantized, layer.spec).reshape(-1)
    if layer.scale.ndim == 0:
        scale = scale.amax()
    layer.scale.copy_(torch.maximum(scale, _scale_floor(layer)))
    if learn_rounding:
        steps = layer.scale.expand(w.shape[0] * w.shape[1]).reshape(w.shape[:2])
        q = round_rows(wanted, steps, moments.quantized, layer.spec)
        layer.weight.copy_((q * steps[..., None]).reshape(layer.weight.shape))


def _positions(layer: QuantLayer, x: Tensor) -> int:
    """Input vectors per image."""
    if layer.op.kind == "linear":
        return x[0].numel() // x.shape[-1]
    return math.prod(-(-n // s) for n, s in zip(x.shape[2:], layer.op.stride, strict=True))


class _LockStep:
    """Evaluates a prepared graph node by node on quantized and float values, freeing as it goes."""

    def __init__(self, module: fx.GraphModule, parts: tuple[Tensor, ...]) -> None:
        self.module, self.parts = module, parts
        self.modules: dict[str, nn.Module] = dict(module.named_modules())
        self.values: tuple[dict[fx.Node, list[Any]], dict[fx.Node, list[Any]]] = ({}, {})
        self.left = {n: len(n.users) for n in module.graph.nodes}

    def layer(self, node: fx.Node) -> QuantLayer | None:
        """The quantized layer that a node calls, if it calls one."""
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        return module if isinstance(module, QuantLayer) else None

    def inputs(self, node: fx.Node) -> tuple[list[Tensor], list[Tensor]]:
        """The first input of a node in both networks, per batch."""
        source = node.all_input_nodes[0]
        return self.values[QUANTIZED][source], self.values[FLOAT][source]

    def evaluate(self, node: fx.Node, which: int) -> list[Any]:
        """What a node gives in one of the networks, per batch."""
        if node.op == "placeholder":
            return list(self.parts)
        return [self._evaluate(node, part, which) for part in range(len(self.parts))]

    def keep(self, node: fx.Node, quantized: list[Any], floats: list[Any]) -> None:
        """Store the values of a node, and drop those that nothing reads any more."""
        self.values[QUANTIZED][node], self.values[FLOAT][node] = quantized, floats
        for used in node.all_input_nodes:
            self.left[used] -= 1
            if self.left[used] == 0:
                del self.values[QUANTIZED][used], self.values[FLOAT][used]

    def _evaluate(self, node: fx.Node, part: int, which: int) -> Any:
        def value(n: fx.Node) -> Any:
            return self.values[which][n][part]

        args: Any = fx.node.map_arg(node.args, value)
        kwargs: Any = fx.node.map_arg(node.kwargs, value)
        if node.op == "output":
            return args[0]
        if node.op == "get_attr":
            return _attribute(self.module, str(node.target))
        if node.op == "call_function":
            return node.target(*args, **kwargs)  # type: ignore[operator]
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        module = self.modules[str(node.target)]
        if which == QUANTIZED:
            return module(*args, **kwargs)
        if isinstance(module, FakeQuant) and module.ceiling is not None:
            return args[0].clamp(max=module.ceiling)
        with switched_off(module):
            return module(*args, **kwargs)


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for name in path.split("."):
        value = getattr(value, name)
    return value
