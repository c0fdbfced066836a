"""How a network of any answers learns: from a teacher's answers, the user's loss, or both.

What a teacher says of an output is taken by its kind (`mpq.outputs.divergence`): choices by
`T^2 KL(softmax(z_t / T) || softmax(z / T))` in nats, the mean over places, quantities by half the
square of the difference in units of the teacher's spread. So outputs can be added up, whatever
their sizes and units are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpq.batch import described
from mpq.calls import Inputs, call, leaves
from mpq.data import Normalization
from mpq.errors import DataError, UsageError
from mpq.outputs import CHOICES, divergence, spread_of
from mpq.policy import OutputKind
from mpq.train.objective import Parts


@dataclass(frozen=True)
class Task:
    """What a network of any answers learns from.

    Args:
        kinds: of its outputs.
        teacher: answers as the network does; None: `loss` alone teaches.
        loss: of outputs and batch, a scalar that is a mean over the batch; None: the teacher alone.
        normalize: of the teacher's images, where they are pixels and it wants them otherwise.
        name: of the teacher, for a run that is resumed and for reports.
        step: gives the loss of a batch in the place of the network and of `loss`.

    Raises:
        UsageError: there is neither teacher nor loss, or no output that can be taught.
    """

    kinds: Mapping[str, OutputKind]
    teacher: nn.Module | None = None
    loss: Callable[[Any, Any], Tensor] | None = None
    normalize: Normalization | None = None
    name: str = ""
    step: nn.Module | None = None
    spreads: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.teacher is None and self.loss is None:
            raise UsageError("training needs a teacher or a loss. Got neither.")
        if self.teacher is not None:
            self.teacher.requires_grad_(False)
        if self.loss is None and not self._taught():
            listed = ", ".join(f"{name}: {kind}" for name, kind in self.kinds.items())
            raise UsageError(
                f"nothing that the network answers can be taught: {listed}. Give --loss "
                "module:function, or let it end before its argmax."
            )

    def look(self, inputs: Inputs) -> None:
        """Take the spreads of quantities from the teacher's answers to some inputs."""
        if self.teacher is None:
            return
        for name, answer in self.teach(inputs).items():
            if self.kinds[name] == "regression":
                self.spreads[name] = spread_of(answer)

    @torch.no_grad()
    def teach(self, inputs: Inputs) -> dict[str, Tensor]:
        """What the teacher answers, of the outputs that are taught."""
        assert self.teacher is not None
        found = leaves(call(self.teacher.eval(), inputs))
        missing = self._taught() - set(found)
        if missing:
            raise DataError(
                f"the teacher must answer as the network does, with {', '.join(self.kinds)}. Got "
                f"{', '.join(found)}."
            )
        return {name: found[name] for name in self.kinds if name in self._taught()}

    def parts(
        self, answer: Any, batch: Any, taught: Mapping[str, Tensor] | None, temperature: float,
        weights: tuple[float, float] = (1.0, 1.0),
    ) -> Parts:  # fmt: skip
        """The loss of an answer.

        Args:
            answer: of the network.
            batch: as the user's loss takes it.
            taught: what `teach` gave for it; None without a teacher.
            temperature: of choices.
            weights: of the user's loss and of the teacher's word, where there are both.

        Raises:
            DataError: the teacher's answers have other shapes.
            UsageError: no gradient comes from the user's loss.
        """
        own = None if self.loss is None else self._own(answer, batch)
        told = None if taught is None else self._told(leaves(answer), taught, temperature)
        if own is None or told is None:
            loss = told if own is None else own
            assert loss is not None
        else:
            loss = weights[0] * own + weights[1] * told
        label = torch.zeros_like(loss) if own is None else own
        return Parts(loss, label.detach(), None if told is None else told.detach())

    def _taught(self) -> set[str]:
        return {n for n, kind in self.kinds.items() if kind in CHOICES or kind == "regression"}

    def _own(self, answer: Any, batch: Any) -> Tensor:
        assert self.loss is not None
        found = self.loss(answer, batch)
        if not found.requires_grad:
            raise UsageError(
                f"no gradient comes from the loss {self.loss.__name__}: it must be computed from "
                "the outputs by operations of torch, without argmax, rounding, detach() or numpy."
            )
        return found.float()

    def _told(
        self, found: Mapping[str, Tensor], taught: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        total: list[Tensor] = []
        for name, wanted in taught.items():
            kind, other = self.kinds[name], found.get(name)
            if other is None or other.shape != wanted.shape:
                raise DataError(
                    f"the teacher's {name} must be like the network's, {described(other)}. Got "
                    f"{described(wanted)}."
                )
            t = temperature if kind in CHOICES else 1.0
            spread = self.spreads.get(name, 1.0)
            cost = divergence(kind, wanted.float() / t, other.float() / t, spread)
            total.append(t**2 * cost.mean())
        return torch.stack(total).sum()
