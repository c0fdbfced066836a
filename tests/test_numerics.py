from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpq.numerics import (
    TINY,
    choose_qparams,
    dequantize,
    fake_quantize,
    per_axis,
    quantize,
    sqnr_db,
)
from mpq.quant import ops
from mpq.spec import WIDTHS, QuantSpec

FORMATS = st.builds(
    QuantSpec, st.sampled_from(WIDTHS), st.booleans(), st.sampled_from(["tensor", "channel"])
)
SPECS = [QuantSpec(b, s, g) for b in WIDTHS for s in (True, False) for g in ("tensor", "channel")]


@st.composite
def arrays(draw: st.DrawFn) -> NDArray[np.float32]:
    """Tensors of 1 to 4 dimensions over many magnitudes, some shifted, some all zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    scale = draw(st.sampled_from([0.0, 1e-6, 0.1, 1.0, 300.0]))
    shift = draw(st.sampled_from([-3.0, 0.0, 3.0]))
    return ((rng.standard_normal(shape) + shift) * scale).astype(np.float32)


def ranges(x: torch.Tensor, spec: QuantSpec, axis: int) -> tuple[torch.Tensor, torch.Tensor]:
    if spec.granularity == "tensor":
        return x.amin(), x.amax()
    flat = x.transpose(0, axis).flatten(1) if x.ndim > 1 else x[:, None]
    return flat.amin(1), flat.amax(1)


def oracle(x: NDArray, scale: NDArray, zero: NDArray, spec: QuantSpec, axis: int) -> NDArray:
    """Integers by numpy: the same float32 division, rounded half to even, one slice at a time."""
    q = np.empty(x.shape, np.int64)
    for i in range(x.shape[axis]):
        at = (*[slice(None)] * axis, i)
        s, z = (scale, zero) if scale.ndim == 0 else (scale[i], zero[i])
        q[at] = np.clip(np.rint(x[at] / s).astype(np.float64) + z, spec.qmin, spec.qmax)
    return q


@settings(max_examples=150, deadline=None)
@given(arrays(), FORMATS, st.data())
def test_quantize_equals_numpy(x: NDArray, spec: QuantSpec, data: st.DataObject):
    axis = data.draw(st.integers(0, x.ndim - 1))
    tensor = torch.from_numpy(x)
    scale, zero = choose_qparams(*ranges(tensor, spec, axis), spec)
    q = quantize(tensor, scale, zero, spec, axis)
    expected = oracle(x, scale.numpy(), zero.numpy(), spec, axis)
    np.testing.assert_array_equal(q.numpy(), expected)

    back = dequantize(q, scale, zero, axis).numpy()
    s = per_axis(scale, x.ndim, axis).numpy()
    z = per_axis(zero, x.ndim, axis).numpy()
    np.testing.assert_array_equal(back, (expected - z).astype(np.float32) * s)
    np.testing.assert_array_equal(fake_quantize(tensor, scale, zero, spec, axis).numpy(), back)


@settings(max_examples=150, deadline=None)
@given(arrays(), FORMATS)
def test_the_chosen_range_holds_every_value_and_zero(x: NDArray, spec: QuantSpec):
    tensor = torch.from_numpy(x)
    scale, zero = choose_qparams(*ranges(tensor, spec, 0), spec)
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.int32
    assert bool((scale > 0).all())
    assert bool(((zero >= spec.qmin) & (zero <= spec.qmax)).all())
    if spec.symmetric:
        assert not zero.any()
    error = (fake_quantize(tensor, scale, zero, spec) - tensor).abs()
    # Half a step; a zero point that was rounded may cost an affine range another half at its ends.
    bound = per_axis(scale, x.ndim) * (0.5 if spec.symmetric else 1.0)
    assert bool((error <= bound * 1.01 + 1e-5 * tensor.abs()).all())
    zeros = torch.zeros_like(tensor)
    assert not fake_quantize(zeros, scale, zero, spec).any()


@settings(max_examples=60, deadline=None)
@given(arrays(), FORMATS)
def test_fake_quantize_twice_is_once(x: NDArray, spec: QuantSpec):
    tensor = torch.from_numpy(x)
    scale, zero = choose_qparams(*ranges(tensor, spec, 0), spec)
    once = fake_quantize(tensor, scale, zero, spec)
    assert torch.equal(fake_quantize(once, scale, zero, spec), once)


@settings(max_examples=60, deadline=None)
@given(arrays(), st.sampled_from(WIDTHS), st.booleans())
def test_the_operator_of_the_graph_is_the_same_formula(x: NDArray, bits: int, signed: bool):
    spec, tensor = QuantSpec(bits, signed, "tensor"), torch.from_numpy(x)
    scale, zero = choose_qparams(tensor.amin(), tensor.amax(), spec)
    out = ops.fake_quantize(tensor, scale, zero, spec.qmin, spec.qmax)
    assert torch.equal(out, fake_quantize(tensor, scale, zero, spec))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_extremes_reach_the_ends_of_the_range(spec: QuantSpec):
    shape = () if spec.granularity == "tensor" else (3,)
    low, high = torch.full(shape, float(spec.qmin)), torch.full(shape, float(spec.qmax))
    scale, zero = choose_qparams(low, high, spec)
    assert torch.equal(scale, torch.ones(shape))
    assert not zero.any()
    ends = torch.tensor([[spec.qmin - 9.0, spec.qmax + 9.0]] * 3)
    q = quantize(ends, scale, zero, spec)
    assert q.tolist() == [[spec.qmin, spec.qmax]] * 3


def test_rounding_is_half_to_even():
    spec = QuantSpec(8, True, "tensor")
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    q = quantize(x, torch.tensor(1.0), torch.tensor(0), spec)
    assert q.tolist() == [0, 2, 2, 0, -2]


def test_a_range_without_zero_is_widened_to_it():
    scale, zero = choose_qparams(
        torch.tensor(2.0), torch.tensor(5.1), QuantSpec(8, False, "tensor")
    )
    assert float(scale) == pytest.approx(0.02)
    assert int(zero) == 0
    scale, zero = choose_qparams(
        torch.tensor(-5.1), torch.tensor(-2.0), QuantSpec(8, False, "tensor")
    )
    assert float(scale) == pytest.approx(0.02)
    assert int(zero) == 255


def test_an_empty_range_gets_the_smallest_scale():
    for signed in (True, False):
        zeros = torch.zeros(2)
        scale, zero = choose_qparams(zeros, zeros, QuantSpec(4, signed, "channel"))
        assert scale.tolist() == [TINY, TINY]
        assert zero.tolist() == [0, 0]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_per_axis(axis: int):
    shape = [2, 3, 4]
    values = torch.arange(shape[axis])
    view = per_axis(values, 3, axis)
    assert view.shape[axis] == shape[axis]
    assert view.numel() == shape[axis]
    assert per_axis(torch.ones(1), 3, axis).ndim == 0


def test_sqnr():
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == float("inf")
    assert sqnr_db(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20, abs=1e-5)
    assert sqnr_db(torch.zeros(2), x) < -1000


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_noise_of_uniform_values_is_a_twelfth_of_a_step_squared(bits: int):
    x = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    spec = QuantSpec(bits, True, "tensor")
    scale, zero = choose_qparams(x.amin(), x.amax(), spec)
    # Signal 1 / 3, noise s^2 / 12, s = 1 / qmax.
    expected = 20 * math.log10(2 * spec.qmax)
    assert sqnr_db(x, fake_quantize(x, scale, zero, spec)) == pytest.approx(expected, abs=0.1)
