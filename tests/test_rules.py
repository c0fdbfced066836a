"""Rules on a few lines of ONNX: what they make of them, with the same answers, and why not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxtext import answer, node, ops, parse

from mpq.export.edit import SITE, refusals, run
from mpq.export.gates import HARD_SIGMOID
from mpq.export.opset import GELU_BY_ERF
from mpq.export.rules import GEMM_ZERO_POINTS, GLOBAL_POOL, JOIN_SLICES
from mpq.export.upsample import PLAIN_SHUFFLE

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal((2, 4, 6, 8)).astype(np.float32)
BYTES = RNG.integers(0, 256, (2, 8, 3, 5), np.uint8)


def same(model: ir.Model, rule: Any, tolerance: float = 0.0, **feeds: np.ndarray) -> list[str]:
    """The operators after a rule has been applied once, without another answer."""
    before = answer(model, **feeds)
    assert run(model, [rule]) == 1
    np.testing.assert_allclose(answer(model, **feeds), before, rtol=0, atol=tolerance)
    return ops(model)


def why_not(model: ir.Model, rule: Any) -> str:
    """The one reason for which a rule leaves a model as it is."""
    before = ops(model)
    assert run(model, [rule]) == 0
    assert ops(model) == before
    (reason,) = refusals(rule, model)
    return reason


# -- a mean over space ----------------------------------------------------------------------------

MEAN = "(float[2,4,6,8] x) => (float[a,b,c,d] y) { y = ReduceMean(x, axes) }"


@pytest.mark.parametrize("axes", [[2, 3], [-1, 2]])
def test_a_mean_over_space_is_pooled(axes: list[int]):
    assert same(parse(MEAN, axes=axes), GLOBAL_POOL, 1e-6, x=FLOATS) == ["GlobalAveragePool"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (MEAN.replace("axes)", "other)"), r"must be over axes 2 and 3. Got [3]"),
        (MEAN.replace("Mean(", "Mean<keepdims=0>("), "the mean drops its axes"),
        (MEAN.replace("float[2,4,6,8]", "float[4,6,8]"), "does not have 4 dimensions"),
    ],
)
def test_other_means_stay(text: str, reason: str):
    assert reason in why_not(parse(text, axes=[2, 3], other=[3]), GLOBAL_POOL)


# -- slices ---------------------------------------------------------------------------------------

SLICES = """(float[2,4,6,8] x) => (float[a,b,c,d] y) {
    m = Slice(x, one, big, two)
    y = Slice(m, one, last, three, step)
}"""
CUTS = {"one": [1], "big": [2**31], "two": [2], "three": [3], "last": [-1], "step": [3]}


def test_slices_along_different_axes_are_joined():
    assert same(parse(SLICES, **CUTS), JOIN_SLICES, x=FLOATS) == ["Slice"]


def test_three_slices_become_one():
    text = SLICES.replace("y = ", "n = ").replace("}", "y = Slice(n, zero, one, zero) }")
    model = parse(text, zero=[0], **CUTS)
    before = answer(model, x=FLOATS)
    assert run(model, [JOIN_SLICES]) == 2
    assert ops(model) == ["Slice"]
    assert np.array_equal(answer(model, x=FLOATS), before)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"three": [2]}, "both cut axis 2"),
        ({"three": [-1]}, "starts, ends and axes must be constant, and axes not negative"),
    ],
)
def test_slices_that_cannot_be_joined_stay(changed: dict[str, list[int]], reason: str):
    assert why_not(parse(SLICES, **CUTS | changed), JOIN_SLICES) == reason


def test_a_slice_that_others_read_stays():
    text = SLICES.replace("y = Slice(m", "n = Slice(m").replace("}", "k = Relu(m) y = Sum(n) }")
    model = parse(text, **CUTS)
    assert run(model, [JOIN_SLICES]) == 0


# -- weight zero points of a Gemm -----------------------------------------------------------------

GEMM = """(float[2,4] x) => (float[2,3] y) {
    w = DequantizeLinear<axis=0>(q, s)
    y = Gemm<transB=1>(x, w)
}"""
WEIGHTS = {"q": RNG.integers(-128, 128, (3, 4), np.int8), "s": np.float32([1, 2, 3])}


def test_a_gemm_gets_its_weight_zero_points():
    model = parse(GEMM, **WEIGHTS)
    same(model, GEMM_ZERO_POINTS, x=FLOATS[:, :, 0, 0])
    zero = node(model, "DequantizeLinear").inputs[2]
    assert zero is not None
    assert zero.const_value is not None
    assert zero.const_value.numpy().tolist() == [0, 0, 0]
    assert zero.dtype == ir.DataType.INT8
    assert node(model, "DequantizeLinear").attributes.get_int("axis") == 0
    assert run(model, [GEMM_ZERO_POINTS]) == 0


def test_other_weights_keep_two_inputs():
    model = parse(GEMM.replace("Gemm<transB=1>", "MatMul"), **WEIGHTS)
    assert why_not(model, GEMM_ZERO_POINTS) == "it does not decode the weights of a Gemm"


# -- hard-sigmoid ---------------------------------------------------------------------------------

GATE = """(uint8[2,8,3,5] x) => (uint8[2,8,3,5] y) {
    d = DequantizeLinear(x, s, z)
    h = HardSigmoid<alpha=0.16666667, beta=0.5>(d)
    y = QuantizeLinear(h, t, n)
}"""
GRID = {"s": np.float32(0.05), "z": np.uint8(130), "t": np.float32(1 / 255), "n": np.uint8(0)}


@pytest.mark.parametrize("step", [1 / 255, 1 / 300])
def test_a_hard_sigmoid_between_integers_is_an_addition(step: float):
    model = parse(GATE, **GRID | {"t": np.float32(step)})
    node(model, "QuantizeLinear").metadata_props[SITE] = "gate"
    expected = ["DequantizeLinear", "DequantizeLinear", "Add", "QuantizeLinear"]
    assert same(model, HARD_SIGMOID, 1, x=BYTES) == expected  # a tie may fall to either side
    assert node(model, "QuantizeLinear").metadata_props[SITE] == "gate"


@pytest.mark.parametrize(
    ("text", "changed", "reason"),
    [
        (GATE, {"t": np.float32(0.005)}, "the output saturates above 1"),
        (GATE, {"n": np.uint8(3)}, "the output has a zero point"),
        (GATE.replace("0.5>", "0.4>"), {}, "must be 1/6 and 1/2. Got 0.166667, 0.4"),
        (GATE.replace("(d)", "(e)").replace("h =", "e = Neg(d) h ="), {}, "input is not quantized"),
    ],
)
def test_other_hard_sigmoids_stay(text: str, changed: dict[str, Any], reason: str):
    assert reason in why_not(parse(text, **GRID | changed), HARD_SIGMOID)


# -- forms for old runtimes -----------------------------------------------------------------------

SHUFFLE = """(uint8[2,8,3,5] x) => (uint8[2,2,6,10] y) {
    y = DepthToSpace<blocksize=2, mode="CRD">(x)
}"""


def test_an_interleaving_of_integers_is_written_in_old_operators():
    done = same(parse(SHUFFLE), PLAIN_SHUFFLE, x=BYTES)
    assert done == ["Reshape", "Transpose", "Reshape"]


@pytest.mark.parametrize("sides", ["H,W", "3,W", "H,5"])
def test_and_so_is_one_of_free_sizes(sides: str):
    free = SHUFFLE.replace("2,8,3,5", f"N,8,{sides}").replace("2,2,6,10", "N,2,P,Q")
    done = same(parse(free), PLAIN_SHUFFLE, x=BYTES)
    assert [op for op in done if op in ("Reshape", "Transpose")] == [
        "Reshape",
        "Transpose",
        "Reshape",
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (SHUFFLE.replace("uint8", "float"), "it moves floats, which every runtime can"),
        (SHUFFLE.replace("CRD", "DCR"), "takes the channels of a block apart in another order"),
    ],
)
def test_other_interleavings_stay(text: str, reason: str):
    assert reason in why_not(parse(text), PLAIN_SHUFFLE)


GELU = "(float[2,4,6,8] x) => (float[2,4,6,8] y) { y = Gelu(x) }"


def test_gelu_is_written_by_erf():
    done = same(parse(GELU), GELU_BY_ERF, 1e-6, x=FLOATS)
    assert done == ["Div", "Erf", "Add", "Mul", "Mul"]


def test_two_gelus_have_constants_of_their_own():
    model = parse(GELU.replace("y = Gelu(x)", "m = Gelu(x) y = Gelu(m)"))
    before = answer(model, x=FLOATS)
    assert run(model, [GELU_BY_ERF]) == 2
    np.testing.assert_allclose(answer(model, x=FLOATS), before, atol=1e-6)


def test_gelu_by_tanh_stays():
    text = GELU.replace("Gelu(", 'Gelu<approximate="tanh">(')
    assert why_not(parse(text), GELU_BY_ERF) == "approximated by tanh"
