"""Classification and distillation losses: functions over logits, float32 inside, NaN-safe.

With logits `z`, temperature `T` and `p = softmax(z / T)`, everything is computed from
`log_softmax`, never from the logarithm of a probability, so that `p` may underflow to zero: at any
T from 0.1 to 100 and any finite logits the loss and its gradient are finite. Shapes: student and
teacher `[B, C]` of any floating type, labels `[B]` (class indices) or `[B, C]` (probabilities, e.g.
after mixup; a row of zeros: no label); the result is a float32 scalar, the mean over the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq.numerics import kl_divergence

VARIANCE_FLOOR = 1e-6
"""Added to a variance before its root: constant logits get a finite gradient."""


def cross_entropy(student: Tensor, labels: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with hard or soft labels; `smoothing` in 0..1 moves mass to all classes.

    A row of zeros adds nothing to the mean: that image has no label.
    Source: label smoothing as in Szegedy et al., Rethinking the Inception Architecture, CVPR 2016.
    """
    if labels.ndim == 1:
        return F.cross_entropy(student.float(), labels, label_smoothing=smoothing)
    target = labels.float()
    if smoothing:  # by hand: torch's would give a row of zeros the uniform distribution
        target = (1 - smoothing) * target + smoothing * target.mean(1, keepdim=True)
    return F.cross_entropy(student.float(), target)


def kd_loss(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """`T^2 KL(p_teacher || p_student)`.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    log_s = F.log_softmax(student.float() / temperature, dim=1)
    log_t = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * kl_divergence(log_t, log_s).mean()


def standardize(logits: Tensor) -> Tensor:
    """Logits `[..., C]` with mean 0 and deviation 1 per sample: their shape without their scale.

    Between standardized logits the student need not match the teacher's scale. One is at most
    `sqrt(C - 1)`: with 10 classes T = 2 smooths too much, use 0.5 to 1.
    Source: Sun et al., Logit Standardization in Knowledge Distillation, CVPR 2024.
    """
    z = logits.float()
    centred = z - z.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + VARIANCE_FLOOR)


def dkd_loss(
    student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, beta: float = 2.0
) -> Tensor:
    """`T^2 (TCKD + beta NCKD)`: the target class and the others distilled apart.

    TCKD is the KL of `[p_y, 1 - p_y]`, NCKD the KL of the distributions over the classes other than
    y. Soft labels count as their largest entry. With one other class NCKD is zero.
    Source: Zhao et al., Decoupled Knowledge Distillation, CVPR 2022.
    """
    y = (labels if labels.ndim == 1 else labels.argmax(1)).unsqueeze(1)
    pair_s, rest_s = _decouple(student.float() / temperature, y)
    pair_t, rest_t = _decouple(teacher.float() / temperature, y)
    loss = kl_divergence(pair_t, pair_s) + beta * kl_divergence(rest_t, rest_s)
    return temperature**2 * loss.mean()


def dist_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """`T^2 (inter + gamma intra)`: 1 - Pearson correlation of rows and of columns of p.

    Rows are samples (relations between classes), columns are classes (relations between samples).
    Source: Huang et al., Knowledge Distillation from A Stronger Teacher, NeurIPS 2022.
    """
    p_s = F.softmax(student.float() / temperature, dim=1)
    p_t = F.softmax(teacher.float() / temperature, dim=1)
    inter = (1 - _pearson(p_s, p_t)).mean()
    intra = (1 - _pearson(p_s.T, p_t.T)).mean()
    return temperature**2 * (inter + gamma * intra)


def _decouple(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[B, 2]` of (y, not y), and `[B, C-1]` of the others given not y."""
    classes = torch.arange(z.shape[1], device=z.device)
    others = z[classes != y].reshape(len(z), -1)
    target = z.gather(1, y)
    pair = torch.cat([target, others.logsumexp(1, keepdim=True)], dim=1)
    return F.log_softmax(pair, dim=1), F.log_softmax(others, dim=1)


def _pearson(a: Tensor, b: Tensor, floor: float = 1e-8) -> Tensor:
    """Correlation of each row of `a` with the row of `b`; 0 where a row is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    norms = (a.square().sum(1) + floor**2).sqrt() * (b.square().sum(1) + floor**2).sqrt()
    return (a * b).sum(1) / norms
