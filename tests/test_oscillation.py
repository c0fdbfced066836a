from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq.numerics import fake_quantize
from mpq.quant.layer import QuantLayer
from mpq.spec import weight_spec
from mpq.train.oscillation import dampening, strength


def layer(bits: int) -> QuantLayer:
    torch.manual_seed(bits)
    made = QuantLayer(nn.Conv2d(4, 6, 3), weight_spec(bits), None)
    with torch.no_grad():
        made.scale.mul_(0.6)  # so that some weights are clipped
    return made


@pytest.mark.parametrize("bits", [2, 4])
def test_it_is_the_distance_to_the_grid_inside_the_range(bits: int):
    made = layer(bits)
    step, spec = made.step().detach(), made.spec
    w, s = made.weight.detach(), step.view(-1, 1, 1, 1)
    point = fake_quantize(w, step, torch.zeros_like(step), spec)
    inside = (w >= spec.qmin * s) & (w <= spec.qmax * s)
    assert 0 < int(inside.sum()) < inside.numel()
    expected = (point - w)[inside].square().sum()
    found = dampening(nn.Sequential(made))
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-5)
    found.backward()
    assert torch.allclose(made.weight.grad, torch.where(inside, 2 * (w - point), 0), atol=1e-6)
    assert made.scale.grad is None


def test_descent_on_it_puts_weights_on_the_grid():
    made = layer(4)
    before = made.integers()
    optimizer = torch.optim.SGD([made.weight], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        dampening(made).backward()
        optimizer.step()
    assert float(dampening(made).detach()) < 1e-8
    assert torch.equal(made.integers(), before)


def test_wide_weights_are_left_alone():
    assert float(dampening(nn.Sequential(layer(8), nn.Linear(3, 3)))) == 0.0


def test_its_strength_rises_to_one():
    values = [strength(p / 10) for p in range(11)]
    assert values == sorted(values)
    assert (values[0], values[-1], strength(0.5)) == (0.0, 1.0, pytest.approx(0.5))
