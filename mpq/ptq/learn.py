"""Learn the integers of a block so that its output stays that of the float network.

The loss is the squared error of the block's output on batches of calibration images (Li et al.,
"BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction", 2021); what is
learned are integers, biases and activation steps (see `soft`). Where the block's input is narrow,
it is a random mixture of the quantized and of the float network's values (QDrop). A part of the
calibration images is held out of the learning and judges its result: a block that got no better
stays as it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from mpq.ptq.blocks import Block, counts_samples
from mpq.ptq.soft import DROP, WIDEST, SoftLayer, SoftQuant
from mpq.ptq.store import Stored
from mpq.ptq.walk import FLOAT, QUANTIZED, LockStep, Target, evaluate
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import IslandLayer, QuantLayer

logger = logging.getLogger(__name__)
HELD_OUT = 8
"""One image in so many judges and is not learned from."""
LATER = 0.3
"""Share of the steps after which the integers are learned too."""
LOOKS = 20
"""How often the held-out images judge on the way."""
Soft = dict[str, SoftLayer | SoftQuant]


@dataclass(frozen=True)
class Learning:
    """How a block is learned.

    Args:
        iterations: steps per block.
        batch: images per step.
        lr: of the weights, in their steps; falls to 0 along a cosine, like the other one.
        lr_range: of activation steps (relative) and biases (in standard deviations of the output).
        seed: of batches and dropped quantizers.
    """

    iterations: int = 1000
    batch: int = 32
    lr: float = 1e-2
    lr_range: float = 1e-2
    seed: int = 0


def _rows(kept: list[Stored], index: Tensor) -> Tensor:
    """The values of a tensor for the images `index`, whatever batch they lie in."""
    size = len(kept[0].get())
    found: list[Tensor] = [torch.empty(0)] * len(index)
    batch = index // size
    for k in sorted(set(batch.tolist())):
        places = (batch == k).nonzero().flatten()
        rows = kept[k].rows(index[places] - k * size)
        for place, row in zip(places.tolist(), rows, strict=True):
            found[place] = row
    return torch.stack(found)


def learnable(block: Block, walk: LockStep) -> bool:
    """Whether a block has something narrow to learn, one input and one output per image."""
    if block.entry is None or block.exit is None or not block.layers:
        return False
    modules = [walk.modules[str(n.target)] for n in block.nodes if n.op == "call_module"]
    widths = [m.spec.bits for m in modules if isinstance(m, (QuantLayer, FakeQuant))]
    if min(widths) > WIDEST or sum(walk.sizes) < 2 * HELD_OUT:
        return False
    for node in (block.entry, block.exit):
        first = walk.values[FLOAT][node][0].get()
        if not isinstance(first, Tensor) or first.ndim < 2 or len(first) != walk.sizes[0]:
            return False
    return True


def learn_block(
    block: Block,
    walk: LockStep,
    targets: Mapping[str, Target],
    settings: Learning,
    *,
    seed: int,
    progress: Callable[[int], None] = lambda _: None,
) -> float:
    """Learn a block in place and renew the values of its exit.

    Args:
        block: a learnable block whose layers are quantized.
        walk: both networks, with the values of the block's entry and exit.
        targets: what the layers stand for, by path.
        settings: how.
        seed: of this block.
        progress: called with the steps done.

    Returns:
        The error of the held-out images after learning over the one before: 1 where learning did
        not help and was taken back.
    """
    generator = torch.Generator().manual_seed(seed)
    work = _Learner(block, walk, settings, generator)
    before, saved = work.error(), block_states(block, walk)
    with torch.enable_grad(), _differentiable(walk.module):
        soft = _soften(block, walk, targets, generator)
        work.optimize(soft, before, progress)
    for module in soft.values():
        module.harden()
    after = work.error()
    logger.info("%s: error %+.1f %%", ", ".join(block.layers), 100 * (after / before - 1))
    if not after < before:
        for name, state in saved.items():
            walk.modules[name].load_state_dict(state)
        return 1.0
    entry = walk.values[QUANTIZED][work.entry]
    walk.renew(work.exit, [walk.store.put(work.run(part.get(), {})) for part in entry])
    return after / before


class _Learner:
    """A block as a function of its entry, and the images to learn it from."""

    def __init__(
        self, block: Block, walk: LockStep, settings: Learning, generator: torch.Generator
    ) -> None:
        assert block.entry is not None
        assert block.exit is not None
        self.nodes, self.entry, self.exit = block.nodes, block.entry, block.exit
        self.walk, self.settings, self.generator = walk, settings, generator
        self.quantized = walk.values[QUANTIZED][block.entry]
        self.floats = walk.values[FLOAT][block.entry]
        self.wanted = walk.values[FLOAT][block.exit]
        count = sum(walk.sizes)
        order = torch.randperm(count, generator=generator)
        self.judges, self.learned = order[: count // HELD_OUT], order[count // HELD_OUT :]
        source = walk.modules.get(str(block.entry.target))
        self.mixes = isinstance(source, FakeQuant) and source.spec.bits <= WIDEST

    def run(self, x: Tensor, soft: Soft) -> Tensor:
        """The exit's value, with stand-ins for some of the modules."""
        values: dict[fx.Node, Any] = {self.entry: x}

        def value(node: fx.Node) -> Any:
            if node not in values:  # of before the block: what the network's samples do not change
                values[node] = (
                    len(x) if counts_samples(node) else evaluate(self.walk.interpreter, node, value)
                )
            return values[node]

        for node in self.nodes:
            if node.op != "output":
                module = soft.get(str(node.target)) if node.op == "call_module" else None
                values[node] = evaluate(self.walk.interpreter, node, value, module)
        return cast(Tensor, values[self.exit])

    def error(self) -> float:
        """Mean squared error on the images that judge, with a floor that can be divided by."""
        return max(self.judge({}), 1e-30)

    def judge(self, soft: Soft) -> float:
        """The same without the floor, with stand-ins that leave nothing unquantized."""
        x, wanted = _rows(self.quantized, self.judges), _rows(self.wanted, self.judges)
        for module in soft.values():
            module.eval()
        with torch.no_grad():
            found = float((self.run(x, soft) - wanted).square().mean())
        for module in soft.values():
            module.train()
        return found

    def optimize(self, soft: Soft, scale: float, progress: Callable[[int], None]) -> None:
        """Descend on the error of the output, in units of `scale`; end at the best point seen.

        Steps and biases go first; the integers move from `LATER` on.
        """
        settings = self.settings
        named = [(n, p) for m in soft.values() for n, p in m.named_parameters()]
        groups = [
            {"params": [p for n, p in named if n == "reals"], "lr": settings.lr},
            {"params": [p for n, p in named if n != "reals"], "lr": settings.lr_range},
        ]
        optimizer = torch.optim.Adam([group for group in groups if group["params"]])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: 0.5 * (1 + math.cos(math.pi * step / max(1, settings.iterations))),
        )
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        integers = {id(p) for n, p in named if n == "reals"}
        begin = int(LATER * settings.iterations)
        best, found = self.judge(soft), [p.detach().clone() for p in parameters]
        for step in range(settings.iterations):
            x, wanted = self._batch()
            loss = (self.run(x, soft) - wanted).square().mean() / scale
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                still = id(parameter) in integers and step < begin
                parameter.grad = None if still else gradient
            optimizer.step()
            schedule.step()
            progress(step + 1)
            if (step + 1) % max(1, settings.iterations // LOOKS) == 0:
                now = self.judge(soft)
                if now < best:
                    best, found = now, [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, found, strict=True):
                parameter.copy_(value)

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Random images: the block's input, and what it should give."""
        count = torch.Size((self.settings.batch,))
        picked = self.learned[torch.randint(len(self.learned), count, generator=self.generator)]
        x = _rows(self.quantized, picked)
        if self.mixes:
            keep = torch.rand(x.shape, generator=self.generator) < DROP
            x = torch.where(keep, _rows(self.floats, picked), x)
        return x, _rows(self.wanted, picked)


def _soften(
    block: Block, walk: LockStep, targets: Mapping[str, Target], generator: torch.Generator
) -> Soft:
    soft: Soft = {}
    for node in block.nodes:
        if node.op != "call_module":
            continue
        name, module = str(node.target), walk.modules[str(node.target)]
        if isinstance(module, QuantLayer):
            soft[name] = SoftLayer(module, targets[name].weight)
        elif isinstance(module, FakeQuant):
            soft[name] = SoftQuant(module, generator)
    return soft


@contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Layers inside islands answer with gradients inside the block."""
    islands = [m for m in module.modules() if isinstance(m, IslandLayer)]
    parts = [part for island in islands for part in island.modules()]
    for part in parts:
        part.training = True
    try:
        yield
    finally:
        for part in parts:
            part.training = False


def block_states(block: Block, walk: LockStep) -> dict[str, dict[str, Tensor]]:
    """A copy of the state of every module that a block calls, by module path."""
    names = [str(n.target) for n in block.nodes if n.op == "call_module"]
    states = {name: walk.modules[name].state_dict() for name in names}
    return {name: {k: v.clone() for k, v in s.items()} for name, s in states.items()}
