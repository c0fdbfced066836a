"""How much each teacher of an ensemble counts, per sample.

A weighting is a function `(teacher_logits [K, B, C], student_logits [B, C], labels, progress)` ->
weights `[K, B]`, non-negative and summing to 1 over the K members. `labels` are class indices
`[B]`, probabilities `[B, C]` or None (unlabelled images: the members' mean prediction stands in);
`progress` runs from 0 to 1 over training. Any callable of that form will do. All values are
float32. H is the entropy, CE_k the cross-entropy of member k on the label, both of the members'
own predictions; `gradient` sees logits as the distillation loss does, at its temperature, and
`dynamic` compares the shapes of the members' logits with those of the student.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.numerics import kl_divergence
from mpq.train.losses import standardize

Weighting = Callable[[Tensor, Tensor, Tensor | None, float], Tensor]

GRADIENT_CAP = 0.6
"""AEKD's upper bound for one member's weight."""

_SOLVER_STEPS = 48


def mean(teachers: Tensor, student: Tensor, labels: Tensor | None, progress: float) -> Tensor:
    """Every member counts the same."""
    return torch.full(teachers.shape[:2], 1 / len(teachers), device=teachers.device)


def vote(teachers: Tensor, student: Tensor, labels: Tensor | None, progress: float) -> Tensor:
    """Majority vote: the members that chose the winning class share the weight.

    A tie goes to the class with the larger summed probability.
    """
    ballots = F.one_hot(teachers.argmax(2), teachers.shape[2]).float()  # [K, B, C]
    tie_break = teachers.float().softmax(2).mean(0)
    winner = (ballots.sum(0) + 0.5 * tie_break).argmax(1)  # [B]
    in_majority = (teachers.argmax(2) == winner).float()
    return in_majority / in_majority.sum(0)


def entropy(teachers: Tensor, student: Tensor, labels: Tensor | None, progress: float) -> Tensor:
    """`w_k = (1 - H_k / sum H) / (K - 1)`: confident members count more.

    Source: Kwon et al., Adaptive Knowledge Distillation Based on Entropy, ICASSP 2020.
    """
    if len(teachers) == 1:
        return mean(teachers, student, labels, progress)
    log_p = F.log_softmax(teachers.float(), dim=2)
    h = -(log_p.exp() * log_p).sum(2).clamp(max=0)  # [K, B]
    total = h.sum(0)
    share = torch.where(total > 0, h / total.clamp(min=1e-30), 1 / len(h))
    return (1 - share) / (len(h) - 1)


def confidence(teachers: Tensor, student: Tensor, labels: Tensor | None, progress: float) -> Tensor:
    """`w_k = (1 - softmax_k(CE_k)) / (K - 1)`: members that know the label count more.

    Source: Zhang et al., Confidence-Aware Multi-Teacher Knowledge Distillation, ICASSP 2022.
    """
    if len(teachers) == 1:
        return mean(teachers, student, labels, progress)
    return (1 - _risk(teachers, labels).softmax(0)) / (len(teachers) - 1)


def gradient(
    teachers: Tensor,
    student: Tensor,
    labels: Tensor | None,
    progress: float,
    *,
    temperature: float = 1.0,
    standardized: bool = False,
) -> Tensor:
    """`min_a ||sum_k a_k g_k||^2`, `sum a = 1`, `0 <= a_k <= 0.6`: where the members agree.

    `g_k = p_s - p_k` has the direction of the gradient of member k's KL in the student's logits.
    Solved for each sample by Frank-Wolfe with exact line search on the K x K Gram matrix.
    `temperature` and `standardized` are those of the distillation loss.
    Source: Du et al., Agree to Disagree: Adaptive Ensemble Knowledge Distillation, NeurIPS 2020.
    """
    log_p, log_s = (_seen(z, temperature, standardized) for z in (teachers, student))
    g = (log_s.exp() - log_p.exp()).transpose(0, 1)  # [B, K, C]
    gram = g @ g.transpose(1, 2)  # [B, K, K]
    cap = max(GRADIENT_CAP, 1 / len(teachers))
    ranks = torch.arange(len(teachers), device=g.device)
    fill = (1 - cap * ranks).clamp(0, cap)  # the best corner: as much as allowed, best first
    a = torch.full(g.shape[:2], 1 / len(teachers), device=g.device)
    for _ in range(_SOLVER_STEPS):
        slope = (gram @ a.unsqueeze(2)).squeeze(2)
        corner = torch.zeros_like(a).scatter(1, slope.argsort(1), fill.expand_as(a))
        move = corner - a
        curve = (move * (gram @ move.unsqueeze(2)).squeeze(2)).sum(1, keepdim=True)
        length = -(move * slope).sum(1, keepdim=True) / curve.clamp(min=1e-20)
        a = a + length.clamp(0, 1) * move
    return a.T


def dynamic(
    teachers: Tensor,
    student: Tensor,
    labels: Tensor | None,
    progress: float,
    *,
    beta: float = 1.0,
    tau: float = 0.25,
) -> Tensor:
    """`w_k ~ exp(-(CE_k + beta (1 - progress) KL(p_k || p_s)) / tau)`, per sample.

    Members that are right about this image, and that the student can follow now: early in training
    a member far from the student is held back, at the end only being right counts. Members that are
    all right weigh the same in the end, where the mean is the choice of least variance.

    The distance is one of shapes, between standardized logits (Sun et al., Logit Standardization in
    Knowledge Distillation, CVPR 2024). The scale of a member's logits comes from its weight decay
    and its epochs, not from what it knows of an image, and a young student is nearer to small
    logits than to large ones, whoever gives them: a distance that heard of the scale gave one
    member of four 86 % of the weight.

    Args:
        teachers: logits `[K, B, C]`.
        student: logits `[B, C]`.
        labels: `[B]`, `[B, C]` or None.
        progress: 0..1.
        beta: weight of the distance to the student at the start, >= 0.
        tau: softness in nats; large is near the mean, small picks one member. > 0. At 1 a member
            that is right but unsure (CE 0.5) still counts for 0.6 of one that is sure, at 0.25 for
            0.14.
    """
    log_p, log_s = (_seen(z, 1.0, standardized=True) for z in (teachers, student))
    cost = _risk(teachers, labels) + beta * (1 - progress) * kl_divergence(log_p, log_s)
    return (-cost / tau).softmax(0)


def _seen(logits: Tensor, temperature: float, standardized: bool) -> Tensor:
    """Log-probabilities as the distillation loss sees them."""
    z = standardize(logits) if standardized else logits.float()
    return F.log_softmax(z / temperature, dim=-1)


def _risk(teachers: Tensor, labels: Tensor | None) -> Tensor:
    """CE_k `[K, B]` on the labels, or on the mean prediction where there are none."""
    log_p = F.log_softmax(teachers.float(), dim=2)
    if labels is None:
        labels = log_p.exp().mean(0)
    if labels.ndim == 1:
        return -log_p.gather(2, labels.expand(len(teachers), -1).unsqueeze(2)).squeeze(2)
    return -(labels.float() * log_p).sum(2)


def complete(labels: Tensor, teachers: Tensor) -> Tensor:
    """Probabilities `[B, C]`, with the members' mean prediction for what a row lacks to 1."""
    lacking = (1 - labels.sum(1, keepdim=True)).clamp(min=0)
    return labels + lacking * teachers.float().softmax(2).mean(0)


WEIGHTINGS: dict[str, Weighting] = {
    "mean": mean,
    "vote": vote,
    "entropy": entropy,
    "confidence": confidence,
    "gradient": gradient,
    "dynamic": dynamic,
}
"""The weightings by the name that a recipe uses."""


def combine_logits(teachers: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """`z [B, C]` with `softmax(z / T) = sum_k w_k softmax(z_k / T)`, finite where p underflows.

    For KL losses distilling from this mixture has the gradient of the weighted sum of losses.
    """
    log_p = F.log_softmax(teachers.float() / temperature, dim=2)
    return temperature * torch.logsumexp(weights.log().unsqueeze(2) + log_p, dim=0)
