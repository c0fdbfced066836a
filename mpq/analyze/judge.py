"""What a change of a network's answers costs, all its outputs together.

Costs of outputs add up: each is a mean over its places, in nats, with quantities in units of their
spread (`mpq.outputs`), so none drowns the others. What is exact costs only where it is measured: no
gradient reaches it. Ignored outputs cost nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpq.calls import Inputs, call, leaves, split, take
from mpq.errors import GraphError
from mpq.graph.ir import QuantGraph
from mpq.graph.outputs import classifier
from mpq.outputs import CHOICES, direction, divergence, spread_of
from mpq.policy import OutputKind

SPREAD_IMAGES = 128
"""Images that the spreads of outputs are taken from."""
Answers = Mapping[str, Tensor]
"""What a network answers, by name of output."""


@dataclass(frozen=True)
class Judge:
    """Judges answers of one network.

    Args:
        kinds: of its outputs.
        spreads: of those of kind `regression`.
    """

    kinds: Mapping[str, OutputKind]
    spreads: Mapping[str, float]

    @classmethod
    @torch.no_grad()
    def of(cls, graph: QuantGraph, images: Inputs, batch: int) -> Judge:
        """The judge of a graph in stage `float`, which is run only where there are quantities."""
        kinds = {name: output.kind for name, output in graph.outputs.items()}
        seen: dict[str, list[Tensor]] = {n: [] for n, kind in kinds.items() if kind == "regression"}
        for part in split(take(images, slice(SPREAD_IMAGES)), batch) if seen else ():
            answers = leaves(call(graph.module, part))
            for name, values in seen.items():
                values.append(answers[name].flatten())
        return cls(kinds, {name: spread_of(torch.cat(values)) for name, values in seen.items()})

    def answers(self, answer: Any) -> dict[str, Tensor]:
        """The outputs that count, by name, with a first dimension."""
        found = leaves(answer)
        counted = (name for name, kind in self.kinds.items() if kind != "ignored")
        return {name: found[name].reshape(found[name].shape or (1,)) for name in counted}

    def cost(self, reference: Answers, other: Answers, count: int) -> Tensor:
        """What `other` costs where `reference` is right, float64 `[count]`, for each image."""
        total = torch.zeros(count, dtype=torch.float64)
        for name, kind in self.kinds.items():
            if kind != "ignored":
                one, two = (_wide(answers[name]) for answers in (reference, other))
                cost = divergence(kind, one, two, self.spreads.get(name, 1.0)).double().cpu()
                total += cost if len(cost) == count else cost.mean()  # one for all images
        return total

    def pull(self, answers: Answers, temperature: float, generator: torch.Generator) -> Tensor:
        """`v' z`, whose gradient scores: a random direction at each output, all added up.

        The directions are independent, so that the expected square of the sum is the sum of those
        of the outputs.

        Raises:
            GraphError: no gradient reaches any output that counts.
        """
        pulls: list[Tensor] = []
        for name, z in answers.items():
            kind = self.kinds[name]
            if (kind in CHOICES or kind == "regression") and z.requires_grad and z.numel():
                signs = torch.randint(0, 2, z.shape, generator=generator).to(z) * 2 - 1
                spread = self.spreads.get(name, 1.0)
                v = direction(kind, z.detach(), signs, spread=spread, temperature=temperature)
                pulls.append((z * v).sum())
        if not pulls:
            listed = ", ".join(f"{name}: {kind}" for name, kind in self.kinds.items())
            raise GraphError(
                "metrics of gradients need an output of floats that depends on the layers and is "
                f"not empty on these inputs. Got {listed}. Score by --metric kl, which measures, "
                "or let the network end before its argmax or its choice of boxes."
            )
        total: Tensor = torch.stack(pulls).sum() if len(pulls) > 1 else pulls[0]
        return total


def logits_of(graph: QuantGraph, answer: Any, purpose: str) -> Tensor:
    """The logits `[N, K]` of a network that is a classifier and nothing else.

    Raises:
        GraphError: it is not.
    """
    if not classifier(graph.outputs):
        listed = ", ".join(f"{name}: {output.kind}" for name, output in graph.outputs.items())
        raise GraphError(
            f"{purpose} needs a network that answers with [N, classes] and nothing else, since "
            f"labels are classes of images. Got outputs {listed}. Take the metric fisher or kl, "
            "which ask the network itself."
        )
    logits: Tensor = next(iter(leaves(answer).values()))
    return logits.flatten(1)


def _wide(z: Tensor) -> Tensor:
    return z.double() if z.is_floating_point() else z
