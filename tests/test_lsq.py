"""The step's gradient, against autograd of LSQ written with detach, and against differences."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mpq.numerics import fake_quantize, per_axis
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.lsq import learned_fake_quantize
from mpq.spec import QuantSpec

CASES = list(itertools.product((2, 4, 8, 16), (True, False), ("tensor", "channel"), (0, 1)))


def reference(
    x: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec, axis: int, count: int
) -> Tensor:
    """LSQ as its paper's pseudocode has it: straight-through rounding, scaled step gradient."""
    g = 1 / (count * spec.qmax) ** 0.5
    scale = (scale - scale * g).detach() + scale * g
    s, z = per_axis(scale, x.ndim, axis), per_axis(zero, x.ndim, axis)
    v = x / s + z
    clipped = v.clamp(spec.qmin, spec.qmax)
    return (clipped + (clipped.round() - clipped).detach() - z) * s


def example(
    bits: int, signed: bool, granularity: str, axis: int
) -> tuple[QuantSpec, Tensor, Tensor, Tensor]:
    spec = QuantSpec(bits, signed, granularity)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(4, 5, 6, dtype=torch.float64, generator=generator)
    channels = () if granularity == "tensor" else (x.shape[axis],)
    # Small enough that a part of the values lies beyond both ends of the range.
    scale = (2 / 2**bits) * (0.5 + torch.rand(channels, dtype=torch.float64, generator=generator))
    zero = torch.full(channels, 0 if signed else 2 ** (bits - 1) - 1, dtype=torch.int32)
    return spec, x.requires_grad_(), scale.requires_grad_(), zero


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_gradients_equal_the_reference(bits: int, granularity: str, axis: int):
    for signed in (True, False):
        check_gradients(bits, signed, granularity, axis)


def check_gradients(bits: int, signed: bool, granularity: str, axis: int) -> None:
    spec, x, scale, zero = example(bits, signed, granularity, axis)
    upstream = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    found = learned_fake_quantize(x, scale, zero, spec, axis=axis, count=30)
    expected = reference(x, scale, zero, spec, axis, 30)
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        v = x / per_axis(scale, 3, axis) + per_axis(zero, 3, axis)
        assert bool((v < spec.qmin).any())  # or the case would not show what clipping does
        assert bool((v > spec.qmax).any())

    dx, ds = torch.autograd.grad((found * upstream).sum(), (x, scale))
    dx_expected, ds_expected = torch.autograd.grad((expected * upstream).sum(), (x, scale))
    assert torch.allclose(dx, dx_expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ds, ds_expected, rtol=1e-10, atol=1e-12)


def test_forward_is_the_one_formula():
    for bits, signed, granularity, axis in CASES:
        spec, x, scale, zero = example(bits, signed, granularity, axis)
        x, scale = x.detach().float(), scale.detach().float()
        found = learned_fake_quantize(x, scale, zero, spec, axis=axis, count=1)
        assert torch.equal(found, fake_quantize(x, scale, zero, spec, axis)), (spec, axis)


def test_the_step_gradient_of_clipped_values_is_the_true_derivative():
    spec = QuantSpec(4, True, "tensor")
    x, zero = torch.tensor([5.0, -7.0, 9.0], dtype=torch.float64), torch.tensor(0)
    scale = torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    out = learned_fake_quantize(x, scale, zero, spec, axis=0, count=1).sum()
    (gradient,) = torch.autograd.grad(out, scale)
    step = 1e-4
    with torch.no_grad():
        up = fake_quantize(x, scale + step, zero, spec).sum()
        down = fake_quantize(x, scale - step, zero, spec).sum()
    assert float(gradient) * 7**0.5 == pytest.approx(float(up - down) / (2 * step), rel=1e-9)
    assert float(up - down) / (2 * step) == pytest.approx(7 - 8 + 7)


def test_gradient_descent_finds_a_step_that_is_near_the_best():
    spec = QuantSpec(3, True, "tensor")
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    scale, zero = torch.tensor(2.0, requires_grad=True), torch.tensor(0)
    for _ in range(300):
        error = learned_fake_quantize(x, scale, zero, spec, axis=0, count=1).sub(x).square().mean()
        (gradient,) = torch.autograd.grad(error, scale)
        scale = (scale - 0.2 * gradient).detach().requires_grad_()
    errors = [
        float((fake_quantize(x, torch.tensor(s), zero, spec) - x).square().mean())
        for s in torch.linspace(0.2, 1.5, 100).tolist()
    ]
    reached = float((fake_quantize(x, scale.detach(), zero, spec) - x).square().mean())
    assert reached < 1.05 * min(errors)


def test_fake_quant_trains_its_step_and_counts_one_image():
    spec = QuantSpec(4, False, "tensor")
    quantizer = FakeQuant(spec)
    quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
    x = torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    quantizer.train()(x).square().sum().backward()
    scale = quantizer.scale.detach().clone().requires_grad_()
    reference(x, scale, quantizer.zero_point, spec, 0, 3 * 5 * 5).square().sum().backward()
    assert float(quantizer.scale.grad) == pytest.approx(float(scale.grad), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_halves_come_out_as_halves_of_the_same_grid(dtype: torch.dtype, granularity: str):
    spec, x, scale, zero = example(8, False, granularity, 0)
    x = x.detach().to(dtype).requires_grad_()
    scale = scale.detach().float().requires_grad_()
    found = learned_fake_quantize(x, scale, zero, spec, axis=0, count=30)
    wide = x.detach().float().requires_grad_()
    expected = learned_fake_quantize(wide, scale, zero, spec, axis=0, count=30)
    assert torch.equal(found, expected.to(dtype))

    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dx, ds = torch.autograd.grad((found * upstream).sum(), (x, scale))
    dx_wide, ds_wide = torch.autograd.grad((expected * upstream.float()).sum(), (wide, scale))
    assert torch.equal(dx.float(), dx_wide)
    torch.testing.assert_close(ds, ds_wide, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_pieces_and_the_whole_have_the_same_gradients(granularity: str, monkeypatch):
    spec, x, scale, zero = example(4, False, granularity, 0)
    x = x.detach().float().requires_grad_()
    scale = scale.detach().float().requires_grad_()
    upstream = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def gradients() -> tuple[Tensor, Tensor, Tensor]:
        out = learned_fake_quantize(x, scale, zero, spec, axis=0, count=30)
        return (out, *torch.autograd.grad((out * upstream).sum(), (x, scale)))

    monkeypatch.setattr("mpq.quant.lsq.PIECE", 7)
    pieces = gradients()
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    whole = gradients()
    assert torch.equal(pieces[0], whole[0])
    assert torch.equal(pieces[1], whole[1])
    torch.testing.assert_close(pieces[2], whole[2], rtol=1e-5, atol=1e-6)
