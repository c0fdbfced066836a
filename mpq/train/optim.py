"""Parameter groups, the learning rate of a step, and the moving average of the weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from mpq.train.recipe import Recipe

AVERAGED_BUFFERS = ("running_mean", "running_var")
"""Buffers that are estimates; all others (zero points, counters) are copied, not averaged."""


def parameter_groups(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Weights (decay), biases and normalisation (none), quantizer steps (own rate, none).

    Each group carries `factor`, by which the learning rate of a step is multiplied.
    """
    decayed, plain, steps = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.rpartition(".")[2] == "scale":
            steps.append(parameter)
        elif parameter.ndim <= 1:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay, "factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "factor": 1.0},
        {"params": steps, "weight_decay": 0.0, "factor": recipe.step_lr},
    ]
    return [g for g in groups if g["params"]]


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW."""
    groups = parameter_groups(model, recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.momentum, 0.999))
    return torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0
    )


def learning_rate(recipe: Recipe, step: int, steps_per_epoch: int) -> float:
    """Rate of step `step` (from 0): linear warm-up, then half a cosine to `final_lr * lr`."""
    warmup = recipe.warmup_epochs * steps_per_epoch
    if step < warmup:
        return recipe.lr * (step + 1) / (math.floor(warmup) + 1)
    total = recipe.epochs * steps_per_epoch
    fraction = min(1.0, (step - warmup) / max(1.0, total - warmup))
    cosine = (1 + math.cos(math.pi * fraction)) / 2
    return recipe.lr * (recipe.final_lr + (1 - recipe.final_lr) * cosine)


class Ema:
    """Moving average of a model's weights: `a <- a + (1 - d) (w - a)`.

    `d` is `decay`, and smaller in the first steps (`(1 + n) / (10 + n)`), so that the average does
    not remember the initial weights.

    Args:
        model: copied; the copy is `module`.
        decay: 0..1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(model).requires_grad_(False).eval()

    def restart(self, model: nn.Module) -> None:
        """Forget the past: the average is the model as it is."""
        self.module.load_state_dict(model.state_dict())
        self.updates = 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = [p.detach() for p in model.parameters()]
        buffers = zip(self.module.named_buffers(), model.buffers(), strict=True)
        for (name, own), new in buffers:
            if name.rpartition(".")[2] in AVERAGED_BUFFERS:
                averaged.append(own)
                current.append(new)
            else:
                own.copy_(new)
        if averaged:
            torch._foreach_lerp_(averaged, current, 1 - decay)
