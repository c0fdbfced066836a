"""Quantize layer after layer in one walk over the graph, float and quantized network in lock step.

At each layer the inputs of both networks are at hand: the integer weights are chosen on the
quantized input against the float output, then the bias takes up what is left of the mean error
(Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
section 4.2, here with measured means). Later layers see the quantized network as it then is. Where
a block of layers ends, a `BlockLearner` may go over it again as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from mpq.calls import Inputs, count, split
from mpq.errors import GraphError, UsageError
from mpq.graph.ir import QuantGraph
from mpq.numerics import per_axis
from mpq.ptq.blocks import Block, blocks
from mpq.ptq.blockwise import BlockLearner, Finished
from mpq.ptq.observe import Method, set_range
from mpq.ptq.store import ActivationStore, Stored
from mpq.ptq.walk import FLOAT, QUANTIZED, LockStep, Target
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import IslandLayer, QuantLayer
from mpq.quant.operation import integer_bias
from mpq.quant.ranges import weight_scales
from mpq.quant.rounding import (
    MAX_COLUMNS,
    Gram,
    grouped,
    input_vectors,
    refine,
    round_rows,
    scales_by_output,
    target_weights,
)

Progress = Callable[[int, int], None]
MEMORY_MB = 1024
"""Activations of all calibration images that are held in memory; the rest lies on disk."""
REFINED = 6
"""Widest weights, in bits, for which coordinate descent is worth its time."""


@torch.no_grad()
def quantize_layers(
    qg: QuantGraph,
    images: Inputs,
    *,
    method: Method | None = None,
    learn_rounding: bool = True,
    correct_bias: bool = True,
    learner: BlockLearner | None = None,
    memory_mb: float = MEMORY_MB,
    progress: Progress | None = None,
) -> int:
    """Set scales, weights and biases of every quantized layer of a calibrated graph, in place.

    Args:
        qg: a graph in stage `prepared`.
        images: normalized `[N, C, H, W]`, or inputs (`mpq.calls`).
        method: how the range of each quantizer is chosen when the walk comes to it
            (`mpq.ptq.observe.all_at_nodes`); None: they are set.
        learn_rounding: sequential rounding with error feedback; off, rounding to nearest.
        correct_bias: make up for the mean error of each output channel.
        learner: what goes over a block when its layers are done.
        memory_mb: activations held in memory, in MiB; more of them are put on disk.
        progress: called with (layers done, layers in all).

    Returns:
        The number of layers quantized.

    Raises:
        GraphError: the graph is not prepared.
        UsageError: no images.
    """
    qg.require("prepared")
    if not count(images):
        raise UsageError("quantizing layers needs at least one image. Got none.")
    qg.module.eval()
    _initial_scales(qg.module)
    with ActivationStore(int(memory_mb * 2**20)) as store:
        walk = LockStep(qg.module, split(images, qg.batch()), store)
        work = _Sequential(walk, method, learn_rounding, correct_bias, learner, progress)
        for block in blocks(qg.module):
            work.quantize(block)
    return work.done


@dataclass
class _Sequential:
    """The walk over the graph, block after block."""

    walk: LockStep
    method: Method | None
    learn_rounding: bool
    correct_bias: bool
    learner: BlockLearner | None
    progress: Progress | None
    done: int = 0

    def quantize(self, block: Block) -> None:
        """Take over a block that was done before, or quantize its layers and learn it."""
        walk, learner = self.walk, self.learner
        if learner is None:
            for node in block.nodes:
                self._node(node, {})
            return
        held = [n for n in (block.entry, block.exit) if n is not None]
        for node in held:
            walk.hold(node)
        saved = learner.restore(block, walk)
        targets: dict[str, Target] = {}
        for node in block.nodes:
            if saved is None:
                self._node(node, targets)
            else:
                self._restore(node, saved)
        if saved is None:
            learner.learn(block, walk, targets)
        for node in held:
            walk.release(node)

    def _node(self, node: fx.Node, targets: dict[str, Target]) -> None:
        walk = self.walk
        layer = walk.layer(node)
        if layer is None:
            self._range(node)
            wanted = walk.run(node, FLOAT, last=True)
            walk.keep(node, walk.run(node, QUANTIZED, last=True), wanted)
            return
        wanted = walk.run(node, FLOAT)
        bias = None if layer.bias is None else layer.bias.detach().clone()
        weight = layer.weight.detach().clone()
        if not _solvable(layer):
            layer.set_scale(weight_scales(layer.weight, layer.spec, layer.op.axis))
        else:
            x_q, x = walk.inputs(node, QUANTIZED), walk.inputs(node, FLOAT)
            try:
                weight = _choose_integers(layer, x_q, x, self.learn_rounding)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise GraphError(f"the input of {node.target} must be finite: {error}") from None
        targets[str(node.target)] = Target(weight, bias)
        found = walk.run(node, QUANTIZED, last=True)
        if self.correct_bias:
            found = _correct_bias(layer, found, wanted, walk.store)
        walk.keep(node, found, wanted)
        self._tell()

    def _range(self, node: fx.Node) -> None:
        """Choose the range of a quantizer, its float inputs for all images being at hand."""
        quantizer = self.walk.modules.get(str(node.target)) if node.op == "call_module" else None
        if self.method is not None and isinstance(quantizer, FakeQuant):
            inputs = self.walk.inputs(node, FLOAT)
            set_range(str(node.target), quantizer, lambda: (x.get() for x in inputs), self.method)

    def _restore(self, node: fx.Node, finished: Finished) -> None:
        walk, name, layer = self.walk, str(node.target), self.walk.layer(node)
        wanted = walk.run(node, FLOAT)
        if name in finished.states:
            walk.modules[name].load_state_dict(finished.states[name])
        if layer is None or layer.bias is None or name not in finished.uncorrected:
            found = walk.run(node, QUANTIZED)
        else:  # as it was made: a shifted output may differ in its last bit from one made anew
            bias = layer.bias.detach().clone()
            layer.bias.copy_(finished.uncorrected[name])
            found = _take_bias(layer, bias, walk.run(node, QUANTIZED), walk.store)
        walk.keep(node, found, wanted)
        if layer is not None:
            self._tell()

    def _tell(self) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, self.walk.layers)


def _initial_scales(module: nn.Module) -> None:
    """Scales of least weight error for the layers that no walk comes to."""
    seen: set[int] = set()
    islands = [m for m in module.modules() if isinstance(m, IslandLayer)]
    inner = {id(layer) for island in islands for layer in island.modules()}
    for layer in module.modules():
        if isinstance(layer, QuantLayer):
            _unshare(layer, seen)
            if id(layer) in inner:
                layer.set_scale(weight_scales(layer.weight, layer.spec, layer.op.axis))


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


def _correct_bias(
    layer: QuantLayer, found: list[Stored], wanted: list[Stored], store: ActivationStore
) -> list[Stored]:
    """Add the mean of what the float layer gives over what this one gives, per output channel.

    Returns:
        The layer's output with its new bias.
    """
    if layer.bias is None:
        return found
    error, count = torch.zeros_like(layer.bias), 0
    for got, target in zip(found, wanted, strict=True):
        difference = target.get() - got.get()
        rows = layer.op.by_channel(difference)
        error.add_(rows.sum(1))
        count += rows.shape[1]
    return _take_bias(layer, layer.bias + error / count, found, store)


def _take_bias(
    layer: QuantLayer, bias: Tensor, found: list[Stored], store: ActivationStore
) -> list[Stored]:
    """Set a layer's bias; return its output `found`, shifted by what that changes."""
    assert layer.bias is not None
    shift = _added(layer, bias) - _added(layer, layer.bias)
    layer.bias.copy_(bias)
    moved = []
    for got in found:
        value = got.get()
        value.add_(per_axis(shift, value.ndim, layer.op.channel(value)))  # not seen by others yet
        got.drop()
        moved.append(store.put(value))
    return moved


def _added(layer: QuantLayer, bias: Tensor) -> Tensor:
    """What a bias adds to the output: a multiple of the accumulator's step where that is whole."""
    if layer.source is None:
        return bias.detach().clone()
    step = layer.source.step().detach() * layer.step().detach()
    return integer_bias(bias.detach(), step) * step


def _choose_integers(
    layer: QuantLayer, x_q: list[Stored], x: list[Stored], learn_rounding: bool
) -> Tensor:
    """Set scale and weights of a layer; return the real weights that its integers stand for."""
    w = grouped(layer.op, layer.weight.detach())
    gram = _gram(layer, w, x_q, x if learn_rounding else None)
    wanted = target_weights(w, gram) if learn_rounding else w
    scale = scales_by_output(wanted, gram.error, layer.spec).reshape(-1)
    if layer.scale.ndim == 0:
        scale = scale.amax()
    layer.set_scale(scale)
    if learn_rounding:
        steps = layer.scale.expand(w.shape[0] * w.shape[1]).reshape(w.shape[:2])
        q = round_rows(wanted, steps, gram.quantized, layer.spec)
        if layer.scale.ndim and layer.spec.bits <= REFINED:
            q, steps = refine(wanted, q, steps, gram.quantized, layer.spec)
            layer.set_scale(steps.reshape(-1))
            steps = layer.scale.reshape(steps.shape)
        layer.weight.copy_((q * steps[..., None]).reshape(layer.weight.shape))
    return wanted.reshape(layer.weight.shape)


def _gram(layer: QuantLayer, w: Tensor, x_q: list[Stored], x: list[Stored] | None) -> Gram:
    gram, thin = Gram(w.shape[0], w.shape[2]), 0
    for i, part_q in enumerate(x_q):
        quantized = part_q.get()
        if not thin:
            total = len(x_q) * quantized.shape[0] * _positions(layer, quantized)
            thin = max(1, math.isqrt(total // MAX_COLUMNS))
        parts = [quantized] if x is None else [quantized, x[i].get()]
        gram.add(*(input_vectors(layer.op, layer.weight, part, thin=thin) for part in parts))
    return gram


def _positions(layer: QuantLayer, x: Tensor) -> int:
    """Input vectors per image."""
    if layer.op.kind == "linear":
        return x[0].numel() // x.shape[-1]
    return math.prod(-(-n // s) for n, s in zip(x.shape[2:], layer.op.stride, strict=True))
