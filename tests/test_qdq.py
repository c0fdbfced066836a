"""Translations give, operator by operator, what the operators of a frozen graph give."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpq.export import qdq
from mpq.quant import ops

RNG = np.random.default_rng(0)
SCALE, ZERO = np.array(0.05, np.float32), np.array(3, np.uint8)


def grid(*shape: int) -> np.ndarray:
    """Values on the grid of `SCALE`."""
    return (RNG.integers(-100, 100, shape) * SCALE).astype(np.float32)


def weights(*shape: int) -> np.ndarray:
    return RNG.integers(-128, 128, shape).astype(np.int8)


def both(name: str, *arguments: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the translation gives, evaluated as ONNX, and what the torch operator gives."""
    operator = getattr(ops, name)
    tensors = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    return qdq.TRANSLATIONS[operator](*arguments).value, operator(*tensors).numpy()


@pytest.mark.parametrize("qmax", [255, 15, 3])
def test_a_quantizer_saturates_on_its_integers(qmax: int):
    x = np.linspace(-3, 20, 2001, dtype=np.float32)
    got, want = both("fake_quantize", x, SCALE, ZERO, 0, qmax)
    assert np.array_equal(got, want)
    assert len(np.unique(got)) == qmax + 1


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_of_float_layers_are_expanded(axis: int):
    stored, scale = weights(3, 4, 2, 2), RNG.random((3, 4)[axis], np.float32)
    for scales in (scale, SCALE):
        got, want = both("dequantize", stored, scales, axis)
        assert np.array_equal(got, want)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_adds_its_integer_bias(groups: int):
    x, weight, scale = grid(2, 4, 7, 6), weights(6, 4 // groups, 3, 2), RNG.random(6, np.float32)
    bias = RNG.integers(-9999, 9999, 6).astype(np.int32)
    for given in (bias, None):
        window = ([2, 1], [1, 0], [1, 2], groups)
        got, want = both("conv", x, SCALE, weight, scale, given, *window)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("shape", [(5, 4), (2, 5, 4)])
def test_a_matrix_product_has_two_forms(shape: tuple[int, ...]):
    x, weight, scale = grid(*shape), weights(6, 4), RNG.random(6, np.float32)
    for bias in (RNG.integers(-9999, 9999, 6).astype(np.int32), None):
        got, want = both("linear", x, SCALE, weight, scale, bias)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_a_dynamic_product_rounds_to_the_range_that_it_finds():
    x, weight, scale = RNG.random((2, 5, 4), np.float32), weights(6, 4), RNG.random(6, np.float32)
    for bias in (RNG.random(6, np.float32), None):
        got, want = both("dynamic_linear", x, weight, scale, bias)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_every_operator_has_a_translation():
    made = torch.ops.mpq
    assert set(qdq.TRANSLATIONS) == {getattr(made, name).default for name in made}
