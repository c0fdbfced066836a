from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mpq.train.losses import (
    cross_entropy,
    dist_loss,
    dkd_loss,
    kd_loss,
    standardize,
)


def logits(seed: int, batch: int = 6, classes: int = 5, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, classes, generator=generator)


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


LABELS = torch.tensor([0, 4, 2, 1, 3, 2])

LOSSES = {
    "kd": lambda s, t, temp: kd_loss(s, t, temperature=temp),
    "standardized": lambda s, t, temp: kd_loss(standardize(s), standardize(t), temperature=temp),
    "dkd": lambda s, t, temp: dkd_loss(s, t, LABELS, temperature=temp, beta=2.0),
    "dist": lambda s, t, temp: dist_loss(s, t, temperature=temp),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_finite_value_and_gradient(name, dtype):
    for temperature, scale in itertools.product((0.1, 1.0, 4.0, 100.0), (0.0, 1.0, 1e4)):
        student = logits(0, scale=scale).clamp(-1e4, 1e4).to(dtype).requires_grad_()
        teacher = logits(1, scale=scale).clamp(-1e4, 1e4).to(dtype)
        loss = LOSSES[name](student, teacher, temperature)
        loss.backward()
        assert loss.dtype == torch.float32
        assert torch.isfinite(loss), (temperature, scale)
        assert torch.isfinite(student.grad).all(), (temperature, scale)


@pytest.mark.parametrize("name", LOSSES)
def test_zero_on_agreement_and_positive_otherwise(name):
    teacher = logits(1)
    assert LOSSES[name](teacher, teacher, 2.0).item() == pytest.approx(0, abs=1e-5)
    assert LOSSES[name](logits(0), teacher, 2.0).item() > 0.05


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kd_is_the_textbook_formula(temperature):
    s, t = logits(0), logits(1)
    p = softmax(t.double().numpy() / temperature)
    q = softmax(s.double().numpy() / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert kd_loss(s, t, temperature=temperature).item() == pytest.approx(expected, rel=1e-5)


def test_standardize_is_zero_mean_unit_deviation_and_ignores_scale():
    z = logits(0)
    n = standardize(z)
    torch.testing.assert_close(n.mean(1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(n.std(1, unbiased=False), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(standardize(7 * z + 3), n, atol=1e-4, rtol=0)


def test_standardized_kd_ignores_the_teachers_scale():
    s, t = logits(0), logits(1)
    a = LOSSES["standardized"](s, t, 0.5)
    b = LOSSES["standardized"](s, 10 * t - 4, 0.5)
    assert a.item() == pytest.approx(b.item(), rel=1e-3)


def test_dkd_with_the_weight_of_kd_is_kd():
    # The identity of the paper: KD = TCKD + (1 - p_y) NCKD, for one sample.
    s, t, y = logits(0, batch=1), logits(1, batch=1), torch.tensor([2])
    beta = 1 - F.softmax(t / 3, dim=1)[0, 2].item()
    expected = kd_loss(s, t, temperature=3.0).item()
    assert dkd_loss(s, t, y, temperature=3.0, beta=beta).item() == pytest.approx(expected, rel=1e-4)


def test_dkd_takes_the_larger_half_of_mixed_labels():
    s, t = logits(0), logits(1)
    mixed = 0.7 * F.one_hot(LABELS, 5) + 0.3 * F.one_hot(LABELS.roll(1), 5)
    a = dkd_loss(s, t, mixed, temperature=2.0)
    assert a.item() == dkd_loss(s, t, LABELS, temperature=2.0).item()


def test_dist_is_one_minus_correlation():
    s, t = logits(0), logits(1)
    p, q = softmax(s.double().numpy()), softmax(t.double().numpy())
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    assert dist_loss(s, t).item() == pytest.approx(rows + columns, rel=1e-4)
    assert dist_loss(s, t, gamma=0.0).item() == pytest.approx(rows, rel=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_hard_and_soft_agree(smoothing):
    s = logits(0)
    soft = F.one_hot(LABELS, 5).float()
    log_p = np.log(softmax(s.double().numpy()))
    target = (1 - smoothing) * soft.double().numpy() + smoothing / 5
    expected = -(target * log_p).sum(1).mean()
    assert cross_entropy(s, LABELS, smoothing=smoothing).item() == pytest.approx(expected, rel=1e-5)
    assert cross_entropy(s, soft, smoothing=smoothing).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_images_without_labels_add_nothing_to_the_mean(smoothing):
    s = logits(0).requires_grad_()
    soft = F.one_hot(LABELS, 5).float()
    soft[1:] = 0
    loss = cross_entropy(s, soft, smoothing=smoothing)
    loss.backward()
    alone = cross_entropy(logits(0)[:1], LABELS[:1], smoothing=smoothing)
    assert loss.item() == pytest.approx(alone.item() / len(s), rel=1e-5)
    assert bool((s.grad[1:] == 0).all())
    assert bool((s.grad[0] != 0).any())


def test_cross_entropy_computes_half_precision_in_float():
    s = (1e4 * torch.eye(5)).half().requires_grad_()
    loss = cross_entropy(s, torch.tensor([1, 2, 3, 4, 0]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(1e4, rel=1e-3)
    assert torch.isfinite(s.grad).all()
