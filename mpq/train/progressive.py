"""Progressive lowering: quantizers begin at 8 bits and come down to their policy's widths.

A network that is rounded to 4 bits at once starts far from where it was; one that is lowered in
stages adapts to each (Park and Yoo, "PROFIT: A Novel Training Method for sub-4-bit MobileNet
Models", ECCV 2020, go from 8 over 5 to 4 bits). At each stage the steps of what is lowered are
chosen anew: for weights by squared error, for activations by what the quantizer sees on training
images. What a quantizer ends at is its `goal`, the policy's format; nothing wider is ever exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from mpq.hooks import hooked
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.quant.ranges import activation_range, weight_scales
from mpq.train.evaluate import evaluating
from mpq.train.resume import State

STAGES = (8, 6, 5, 4, 3, 2)
"""Widths on the way; 7 bits would change nothing."""
Quantizer = QuantLayer | FakeQuant


class Lowering:
    """The widths of a run's quantizers, epoch by epoch.

    Args:
        state: of the run; its model, average and optimizer follow the widths.
        epochs: over how many epochs they come down; 0: they have the policy's all along.
    """

    def __init__(self, state: State, epochs: float) -> None:
        self.state, self.epochs = state, epochs

    def begin(self, epoch: int, images: Callable[[], Tensor]) -> None:
        """Bring quantizers to the width of this epoch, with steps that suit it.

        Args:
            epoch: from 0.
            images: gives what activation ranges are chosen on, normalized `[N, C, H, W]`; of
                several processes each must be given the same, so that their steps agree.
        """
        if not self.epochs:
            return
        model, ema = self.state.model, self.state.ema
        self.restore(epoch - 1)  # the widths of the checkpoint, where a run is resumed
        changed = take_widths(model, stage(model, epoch, self.epochs))
        if not changed:
            return
        choose_steps(model, changed, images())
        for quantizer in changed:
            self.state.optimizer.state.pop(quantizer.scale, None)  # momentum of another step
        if ema:
            take_widths(ema.module, stage(model, epoch, self.epochs))
            ema.restart(model)

    def restore(self, epoch: int) -> None:
        """Set the formats, not the steps, that quantizers have in `epoch`; before the first: none.

        `begin` lowers from there.
        """
        if epoch < 0 or not self.epochs:
            return
        for module in (self.state.model, self.state.evaluated):
            take_widths(module, stage(module, epoch, self.epochs))


def stage(model: nn.Module, epoch: int, epochs: float) -> int:
    """Bits that no quantizer is below in `epoch` (from 0) of a lowering over `epochs`."""
    narrowest = min((q.goal.bits for q in quantizers(model)), default=STAGES[0])
    on_the_way = [bits for bits in STAGES if bits >= narrowest] or [narrowest]  # 16 throughout
    last = len(on_the_way) - 1
    return on_the_way[min(last, int(epoch * last / epochs))] if epochs else narrowest


def quantizers(model: nn.Module) -> Iterator[Quantizer]:
    """All modules whose width can change."""
    for module in model.modules():
        if isinstance(module, (QuantLayer, FakeQuant)):
            yield module


def take_widths(model: nn.Module, bits: int) -> list[Quantizer]:
    """Set formats of at least `bits` (none wider than 8 by it), leaving steps; return the changed.

    Steps must then come from a checkpoint, a calibration, or `choose_steps`.
    """
    changed = []
    for q in quantizers(model):
        spec = replace(q.goal, bits=max(q.goal.bits, bits))
        if spec != q.spec:
            q.spec = spec
            changed.append(q)
    return changed


@torch.no_grad()
def choose_steps(model: nn.Module, changed: list[Quantizer], images: Tensor) -> None:
    """Choose the steps of quantizers whose format has changed.

    Args:
        model: in any mode, which it keeps.
        changed: some of its quantizers.
        images: normalized `[N, C, H, W]` on the model's device; ranges are those seen on them.
    """
    for q in changed:
        if isinstance(q, QuantLayer):
            q.set_scale(weight_scales(q.weight, q.spec, q.op.axis))
    hooks = (q.register_forward_pre_hook(_observe) for q in changed if isinstance(q, FakeQuant))
    with hooked(hooks), evaluating(model):
        model(images)


def _observe(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
    """Take the range of what arrives, before it is rounded: later quantizers see it rounded."""
    assert isinstance(quantizer, FakeQuant)
    quantizer.set_range(*activation_range(args[0].float(), quantizer.spec))
