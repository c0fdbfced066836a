"""A file is made small without another answer; names of layers and sites are all that stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnxtext import answer, node, ops, parse

from mpq.export.edit import LAYER, SITE
from mpq.export.slim import slim

TEXT = """(float[1,2,6,6] input) => (float[1,3,2,2] output) {
    q = QuantizeLinear<axis=1>(input, scale, zero)
    c = Clip(q, low, high)
    d = DequantizeLinear(c, same_scale, zero)
    e = DequantizeLinear(c, scale, zero)
    w = DequantizeLinear<axis=0>(weight, scales)
    a = Conv<strides=[2,2], pads=[0,0,0,0], dilations=[1,1], group=1, auto_pad="NOTSET">(d, w)
    b = Conv<strides=[2,2], kernel_shape=[3,3]>(e, w)
    output = Add(a, b)
    unused = Relu(a)
}"""
X = np.linspace(-1, 4, 72, dtype=np.float32).reshape(1, 2, 6, 6)


def model(text: str = TEXT) -> ir.Model:
    made = parse(
        text,
        scale=np.float32(0.1),
        same_scale=np.float32(0.1),
        zero=np.uint8(2),
        low=np.uint8(0),
        high=np.uint8(15),
        weight=np.arange(54, dtype=np.int8).reshape(3, 2, 3, 3),
        scales=np.float32([1, 2, 3]),
    )
    convs = [n for n in made.graph if n.op_type == "Conv"]
    for conv, path in zip(convs, ("body.left", "body.right"), strict=True):
        conv.metadata_props[LAYER] = path
    node(made, "QuantizeLinear").metadata_props[SITE] = "quantizers.x"
    made.metadata_props["origin"] = made.graph.doc_string = "an exporter"
    return made


def test_the_answer_stays_and_the_rest_goes():
    small = model()
    before = answer(small, input=X)
    sites = slim(small)
    assert np.array_equal(answer(small, input=X), before)
    # equal constants are one, so both decodings are one; what nobody reads is gone
    assert ops(small).count("DequantizeLinear") == 2
    assert "Relu" not in ops(small)
    assert len(small.graph.initializers) == 6
    names = [v.name for n in small.graph for v in n.outputs] + list(small.graph.initializers)
    assert all(len(str(name)) == 1 for name in names if name != "output")
    assert sites == {"quantizers.x": node(small, "Clip").outputs[0].name}
    assert [n.name for n in small.graph if n.name] == ["body.left", "body.right"]
    assert not any(n.metadata_props for n in small.graph)
    assert (small.metadata_props, small.producer_name) == ({}, "mpq")


def test_attributes_that_say_the_default_go():
    small = model()
    slim(small)
    left, right = (n for n in small.graph if n.op_type == "Conv")
    assert list(left.attributes) == ["strides"]
    assert set(right.attributes) == {"strides", "kernel_shape"}
    assert not node(small, "QuantizeLinear").attributes  # its scale is a scalar
    axes = [n.attributes.get_int("axis") for n in small.graph if n.op_type == "DequantizeLinear"]
    assert sorted(axes, key=str) == [0, None]


def test_layers_of_equal_weights_that_read_one_tensor_stay_apart():
    made = model(TEXT.replace("strides=[2,2], kernel_shape=[3,3]", "strides=[2,2]"))
    before = answer(made, input=X)
    slim(made)
    assert [n.name for n in made.graph if n.op_type == "Conv"] == ["body.left", "body.right"]
    assert np.array_equal(answer(made, input=X), before)


def test_a_constant_may_have_the_name_that_another_gets():
    text = "(float[2] input) => (float[2] output) { x = Add(input, first)  output = Mul(x, a) }"
    made = parse(text, first=np.float32([1, 2]), a=np.float32([3, 4]))
    slim(made)
    x = np.float32([5, 6])
    assert np.array_equal(answer(made, input=x), (x + np.float32([1, 2])) * np.float32([3, 4]))
