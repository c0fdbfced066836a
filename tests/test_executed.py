"""Matrix nodes are found again under every name that the runtime gives them."""

from __future__ import annotations

import onnx
import pytest

from mpq.export.executed import Execution, constant_roots, executions, operation_of


def parse(text: str) -> onnx.GraphProto:
    return onnx.parser.parse_graph(f"g {text}")


FILE = """(float[1,4,6,6] x) => (float[a,b,c,d] y) <int8[1] q = {1}, float[1] s = {1}> {
    w = DequantizeLinear(q, s)
    [NAME] c = Conv(x, w)
    r = Relu(c)
    y = QuantizeLinear(r, t, z)
}"""
LONG = "(float[1,4,6,6] x) => (uint8[a,b,c,d] y) <uint8[1] u8 = {0}, uint16[1] u16 = {0}> "


def became(body: str, name: str = "") -> Execution:
    """What became of the convolution of `FILE` in an optimized graph of these nodes."""
    (found,) = executions(parse(FILE.replace("[NAME]", name)), parse(f"{LONG}{{ {body} }}"))
    return found


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ("[conv] k = QLinearConv(x, xs, xz, q, ws, wz, ys, yz)", "[conv]"),
        ("[conv_token_7] k = QLinearConv(x, xs, xz, q, ws, wz, ys, yz)", "[conv]"),
        ("[conv_quant] k = QLinearConv(x, xs, xz, q, ws, wz, ys, yz)", "[conv]"),
        ("y = QLinearConv(x, xs, xz, v, ws, wz, ys, yz)", ""),  # by what it writes
        ("k = QLinearConv(x, xs, xz, q, ws, wz, ys, yz)", ""),  # by its weights
    ],
    ids=["name", "token", "suffix", "value", "weights"],
)
def test_an_integer_node_is_found(body: str, name: str):
    assert became(body, name) == Execution("QLinearConv", index=0)


def test_a_node_in_the_blocked_layout_is_found():
    assert became("[c_nchwc] k = Conv(x, v)").op == "Conv"


def test_a_node_that_is_nowhere_has_no_type():
    assert became("k = Relu(x)") == Execution()
    twice = "k = Conv(x, q) m = Conv(k, q)"  # weights of two nodes name neither
    assert became(twice) == Execution()


def test_names_of_nodes_and_of_values_are_kept_apart():
    assert became("[q] k = Conv(x, v) [conv] m = Gemm(k, u)", "[conv]").op == "Gemm"


def test_weights_that_are_decoded_at_every_run_are_seen():
    run = became("d = DequantizeLinear(q, s) t = Transpose(d) c = Conv(x, t)")
    assert (run.op, run.decoding, run.index) == ("Conv", True, 2)


@pytest.mark.parametrize(("zero", "bits"), [("u8", 8), ("u16", 16)])
def test_the_grid_of_a_float_nodes_input_is_seen_through_moves(zero: str, bits: int):
    body = f"d = DequantizeLinear(x, s, {zero}) p = Pad(d, n) m = MaxPool(p) c = Conv(m, q)"
    assert became(body).rounded == bits
    assert became(body.replace("Pad(d, n)", "Relu(d)")).rounded == 0


def test_constants_are_followed_to_what_is_stored():
    graph = parse("""(float[2] x) => (float[2] y) <int8[1] q = {1}> {
        c = Constant<value=int8[1] {3}>()
        r = Reshape(q, c)
        d = DequantizeLinear(r, c)
        y = Add(d, x)
    }""")
    roots = constant_roots(graph)
    assert [roots[name].name for name in ("q", "r", "d")] == ["q"] * 3
    assert "y" not in roots


def test_a_matrix_node_says_what_the_target_is_asked():
    conv, product = parse("""(float[2] x) => (float[2] y) {
        a = ConvTranspose<group=2, strides=[1,2], dilations=[1,1]>(x, w)
        y = MatMul(a, w)
    }""").node
    assert operation_of(product).kind == "linear"
    found = operation_of(conv)
    assert (found.kind, found.grouped, found.strided, found.dilated) == (
        "conv_transpose", True, True, False,
    )  # fmt: skip
