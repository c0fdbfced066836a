"""Attention transfer: the student's feature maps are to look where the teachers' look.

A stage of a network is what its modules last give at one spatial size, and is found by running it
once, whatever its architecture; the attention of a stage is the mean square over its channels, so
that nothing has to be learned to compare networks of other widths. Stages are paired from the
last one backwards, and the larger of two maps is pooled to the smaller.

Source: Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpq.errors import UsageError
from mpq.train.ensemble import Ensemble
from mpq.train.recipe import Recipe

Size = tuple[int, int]


@dataclass(frozen=True)
class Stages:
    """Where a network's feature maps come from.

    Args:
        modules: the spatial size of each stage, first to last, and the module that gives it.
    """

    modules: Mapping[Size, nn.Module]

    @contextmanager
    def watch(self) -> Iterator[list[Tensor]]:
        """A list that holds the attention `[B, H, W]` of each stage after one forward.

        It is filled when the block ends; outside of it nothing is attached to the network.
        """
        seen: dict[Size, Tensor] = {}

        def keep(module: nn.Module, inputs: Any, out: Any) -> None:
            size = _size(out)
            if size is not None and size in self.modules:
                seen[size] = attention(out)  # of several at one size the last stays

        handles = [m.register_forward_hook(keep) for m in dict.fromkeys(self.modules.values())]
        found: list[Tensor] = []
        try:
            yield found
            found += [seen[size] for size in self.modules]
        finally:
            for handle in handles:
                handle.remove()


def find_stages(network: nn.Module, run: Callable[[], object], name: str) -> Stages:
    """Run a network once, in eval mode, and find its stages.

    Sizes of one pixel (pooled features, squeeze and excite) are no stages.

    Args:
        network: whose modules are looked at; its mode is restored.
        run: calls it on an example.
        name: what messages call it.

    Raises:
        UsageError: no module gives a feature map `[B, C, H, W]`.
    """
    last: dict[Size, nn.Module] = {}

    def look(module: nn.Module, inputs: Any, out: Any) -> None:
        size = _size(out)
        if size is not None:
            last.pop(size, None)  # so that stages stand in the order in which they end
            last[size] = module

    before = network.training
    handles = [m.register_forward_hook(look) for m in network.modules()]
    try:
        network.eval()
        with torch.no_grad():
            run()
    finally:
        network.train(before)
        for handle in handles:
            handle.remove()
    if not last:
        raise UsageError(
            f"feature_weight needs networks with feature maps [B, C, H, W]. Got {name}, where no "
            "module gives one. Set feature_weight=0 to distil from logits alone."
        )
    return Stages(last)


def _size(out: object) -> Size | None:
    if not isinstance(out, Tensor) or out.ndim != 4 or out.shape[2] * out.shape[3] == 1:
        return None
    return out.shape[2], out.shape[3]


def attention(features: Tensor) -> Tensor:
    """`[B, H, W]`, float32: the mean over channels of the squares of `[B, C, H, W]`."""
    if features.requires_grad and features.dtype == torch.float32:
        features = features.clone()  # what comes next may work in place
    return features.float().square().mean(1)


def attention_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """`[B]`, in 0..2: `|| a / |a| - b / |b| ||^2`, the mean over the paired stages.

    Args:
        student: attention `[B, H, W]` of each stage, first to last.
        teacher: the same, of other sizes and of another number; extra first stages are left out.
    """
    found = []
    for a, b in zip(reversed(student), reversed(teacher), strict=False):
        size = (min(a.shape[1], b.shape[1]), min(a.shape[2], b.shape[2]))
        a, b = (F.adaptive_avg_pool2d(m.unsqueeze(1), size).flatten(1) for m in (a, b))
        found.append((F.normalize(a) - F.normalize(b)).square().sum(1))
    return torch.stack(found).mean(0)


class Features:
    """Student and teachers, watched while they answer.

    Args:
        student: the network of the training step, not wrapped.
        teacher: the teachers.
        images: an example for teachers, `[B, 3, H, W]` in 0..1.
        inputs: the same as the student takes it, normalized.

    Raises:
        UsageError: a network without feature maps.
    """

    def __init__(
        self, student: nn.Module, teacher: Ensemble, *, images: Tensor, inputs: Tensor
    ) -> None:
        self.teacher = teacher
        self.student = find_stages(student, lambda: student(inputs), "the student")
        self.members = [
            find_stages(m.module, lambda k=k: teacher.answer(k, images), f"teacher {m.name}")  # type: ignore[misc]
            for k, m in enumerate(teacher.members)
        ]

    def __call__(
        self, learn: Callable[[], Tensor], images: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The student's logits `[B, C]`, the teachers' `[K, B, C]`, and distances `[K, B]`."""
        with self.student.watch() as own:
            student = learn()
        answers, distances = [], []
        for k, stages in enumerate(self.members):
            with torch.no_grad(), stages.watch() as theirs:
                answers.append(self.teacher.answer(k, images))
            distances.append(attention_distance(own, theirs))
        return student, torch.stack(answers), torch.stack(distances)


def check_features(recipe: Recipe, teacher: object, answers: Path | None) -> None:
    """Refuse to distil from features that are not there.

    Raises:
        UsageError: teachers' answers are kept, which are logits alone.
    """
    if recipe.feature_weight and teacher is not None and answers is not None:
        raise UsageError(
            "feature_weight must be 0 with --keep-answers: logits are kept, feature maps are not. "
            f"Got {recipe.feature_weight:g}. Leave one of the two out."
        )
