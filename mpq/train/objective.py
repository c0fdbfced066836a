"""The loss that a recipe describes, over the logits of student and teachers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mpq.train import weighting as weightings
from mpq.train.losses import cross_entropy, dist_loss, dkd_loss, kd_loss, standardize
from mpq.train.recipe import Recipe
from mpq.train.weighting import Weighting, combine_logits, complete


@dataclass(frozen=True)
class Parts:
    """A loss and what it is made of.

    Args:
        loss: the scalar to minimise.
        label: the cross-entropy, not yet weighted, without gradient.
        distill: the distillation loss, not yet weighted, without gradient; None without teacher.
        weights: mean weight of each teacher over the batch `[K]`; None without teacher.
    """

    loss: Tensor
    label: Tensor
    distill: Tensor | None = None
    weights: Tensor | None = None


class Objective:
    """Cross-entropy plus distillation from weighed teachers.

    Args:
        recipe: loss, temperature, weights and weighting.
        weighting: replaces the recipe's weighting.
    """

    def __init__(self, recipe: Recipe, weighting: Weighting | None = None) -> None:
        self.recipe = recipe
        self.weighting = weighting or choose_weighting(recipe)

    def __call__(
        self,
        student: Tensor,
        teachers: Tensor | None,
        labels: Tensor,
        *,
        progress: float,
    ) -> Parts:
        """The loss of logits `[B, C]` given teacher logits `[K, B, C]` and labels.

        `labels` are `[B]` or `[B, C]`, a row of zeros for an image without a label: of that the
        teachers alone speak. `progress` runs from 0 to 1 over training.
        """
        recipe = self.recipe
        label = cross_entropy(student, labels, smoothing=recipe.smoothing)
        if teachers is None:
            return Parts(label, label.detach())
        with torch.no_grad():
            labels = labels if labels.ndim == 1 else complete(labels, teachers)
            weights = self.weighting(teachers, student.detach(), labels, progress)
            members = standardize(teachers) if recipe.distill == "standardized" else teachers
            target = combine_logits(members, weights, recipe.temperature)
        distill = self._distill(student, target, labels)
        warmup = recipe.distill_warmup_epochs
        ramp = min(1.0, progress * recipe.epochs / warmup) if warmup else 1.0
        loss = recipe.label_weight * label + recipe.distill_weight * ramp * distill
        return Parts(loss, label.detach(), distill.detach(), weights.mean(1))

    def _distill(self, student: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        recipe, t = self.recipe, self.recipe.temperature
        if recipe.distill == "dkd":
            return dkd_loss(student, target, labels, temperature=t, beta=recipe.dkd_beta)
        if recipe.distill == "dist":
            return dist_loss(student, target, temperature=t)
        if recipe.distill == "standardized":
            student = standardize(student)  # the target's members are standardized already
        return kd_loss(student, target, temperature=t)


def choose_weighting(recipe: Recipe) -> Weighting:
    """The recipe's weighting with its parameters."""
    if recipe.weighting == "gradient":
        alike = recipe.distill == "standardized"
        return partial(weightings.gradient, temperature=recipe.temperature, standardized=alike)
    if recipe.weighting == "dynamic":
        beta, tau = recipe.weighting_beta, recipe.weighting_tau
        return partial(weightings.dynamic, beta=beta, tau=tau)
    return weightings.WEIGHTINGS[recipe.weighting]
