"""Learn block after block, so that an interruption costs one block at most.

What a block was learned to is written down when it is done. A resumed run takes the finished blocks
over and goes on; since all randomness of a block derives from (seed, place of the block), it ends
as the uninterrupted run does, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from mpq.errors import UsageError
from mpq.ptq.blocks import Block, blocks
from mpq.ptq.learn import Learning, block_states, learn_block, learnable
from mpq.ptq.walk import LockStep, Target
from mpq.saved import Kind

KIND = Kind("mpq/rounding", 2, "hold the finished blocks of `mpq ptq`, but does not.", UsageError)
PROGRESS = "rounding.pth"
"""The file of finished blocks in a run."""


@dataclass(frozen=True)
class FinishedBlocks:
    """Where finished blocks are written down.

    Args:
        path: the file.
        identity: what must be equal for them to be taken over, beside the settings of learning.
        resume: take over what the file holds.
    """

    path: Path
    identity: Mapping[str, Any] = field(default_factory=dict)
    resume: bool = False


@dataclass(frozen=True)
class Finished:
    """What a block came to.

    Args:
        states: of its modules, by path.
        uncorrected: biases before their correction, by layer, where the output of the block is
            what the corrections made of it; empty where the block was evaluated anew.
    """

    states: dict[str, dict[str, Tensor]]
    uncorrected: dict[str, Tensor]


class BlockLearner:
    """Goes over each block of a walk when its layers are done, and remembers what it came to.

    Args:
        settings: how a block is learned.
        finished: where finished blocks are written down; None keeps them nowhere.
        progress: called with (steps done, steps in all).

    Raises:
        UsageError: the file of finished blocks belongs to another run or is no such file.
    """

    def __init__(
        self,
        settings: Learning,
        finished: FinishedBlocks | None = None,
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.settings, self.progress = settings, progress
        self.path = finished.path if finished else None
        self.identity = {"learning": asdict(settings), **(finished.identity if finished else {})}
        self.done: list[Finished] = []
        if finished and finished.resume:
            self.done = _read(finished.path, self.identity)
        self.ratios: dict[str, float] = {}
        self._at, self._total = 0, 0

    def restore(self, block: Block, walk: LockStep) -> Finished | None:
        """What a block that was done before came to."""
        if not self._total:
            self._total = len(blocks(walk.module))
        self._at += 1
        if self._at > len(self.done):
            return None
        self._tell(self.settings.iterations)
        return self.done[self._at - 1]

    def learn(self, block: Block, walk: LockStep, targets: Mapping[str, Target]) -> None:
        """Learn a block in place, and write down what it came to.

        The values of its entry and exit must be kept; the exit's quantized ones are renewed.
        `targets` says what its layers stand for, by path.
        """
        ratio = 1.0
        if learnable(block, walk):
            seed = 1000 * self.settings.seed + self._at
            ratio = learn_block(block, walk, targets, self.settings, seed=seed, progress=self._tell)
            self.ratios[block.layers[0]] = ratio
        self._tell(self.settings.iterations)
        biases = {n: t.bias for n, t in targets.items() if t.bias is not None}
        states = block_states(block, walk)
        self.done.append(Finished(states, biases if ratio == 1.0 else {}))
        if self.path is not None:
            done = [vars(block) for block in self.done]
            KIND.save(self.path, {"identity": self.identity, "blocks": done})

    def _tell(self, steps: int) -> None:
        if self.progress:
            each = self.settings.iterations
            self.progress((self._at - 1) * each + steps, self._total * each)


def _read(path: Path, identity: Mapping[str, Any]) -> list[Finished]:
    content = KIND.read(path)
    KIND.refuse_other_run(path, content["identity"], identity)
    return [Finished(**block) for block in content["blocks"]]
