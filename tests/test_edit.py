"""What passes ask a graph, and how they change it; each on a few lines of ONNX."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from onnxtext import answer, node, ops, parse

from mpq.export.edit import (
    LAYER,
    Writer,
    constant,
    integers,
    only_reader,
    own_weight,
    run,
    stored_weights,
    weight_decoding,
)
from mpq.export.groups import merge_groups
from mpq.export.operators import MOVES
from mpq.export.rules import JOIN_SLICES
from mpq.targets import ONNXRUNTIME_CPU

CONV = """(float[1,4,6,6] x) => (float[1,8,4,4] y) {
    w = DequantizeLinear<axis=0>(q, s)
    y = Conv(x, w)
}"""
STORED = {"q": np.ones((8, 4, 3, 3), np.int8), "s": np.ones(8, np.float32)}
X = np.arange(144, dtype=np.float32).reshape(1, 4, 6, 6)


def test_what_moves_values_is_what_the_target_says():
    assert ONNXRUNTIME_CPU.moving_ops <= {op.lower() for op in MOVES}


def test_constants_have_names_of_their_own():
    model = parse(CONV, **STORED)
    names = [constant(model.graph, np.float32(k)).name for k in range(3)]
    del model.graph.initializers[str(names[0])]
    assert len({*names[1:], constant(model.graph, np.float32(3)).name}) == 3


def test_a_writer_writes_before_its_anchor():
    model = parse("(float[3] x) => (float[3] y) { y = Relu(x) }")
    relu = node(model, "Relu")
    write = Writer(model.graph, relu)
    relu.replace_input_with(0, write.node("Mul", relu.inputs[0], write.constant(np.float32(-1))))
    assert ops(model) == ["Mul", "Relu"]
    assert answer(model, x=np.float32([-1, 0, 2])).tolist() == [1, 0, 0]


def test_constants_are_read_through_a_reshape():
    text = "(float[3] x) => (float[a] y) { r = Reshape(c, one) y = Slice(x, r, r, r) z = Add(r, r)}"
    model = parse(text, c=np.array(2), one=[1])
    cut = node(model, "Slice")
    assert integers(cut.inputs[1]) == [2]
    assert integers(cut.inputs[0]) is None
    assert integers(node(model, "Add").outputs[0]) is None
    assert integers(None) is None


def test_the_only_reader_reads_no_graph_output():
    text = "(float[3] x) => (float[3] y) { a = Relu(x) b = Neg(a) y = Add(b, b) z = Neg(y) }"
    model = parse(text)
    relu, add = node(model, "Relu"), node(model, "Add")
    reader = only_reader(relu.outputs[0])
    assert reader is not None
    assert reader.op_type == "Neg"
    assert only_reader(reader.outputs[0]) is None  # read twice
    assert only_reader(add.outputs[0]) is None


def test_weights_are_told_apart_by_how_they_are_decoded():
    conv = node(parse(CONV, **STORED), "Conv")
    decode, weight = weight_decoding(conv), own_weight(conv)
    assert decode is not None
    assert weight is not None
    assert (decode.op_type, weight.name) == ("DequantizeLinear", "q")
    floats = node(parse(CONV.replace("Conv(x, w)", "Conv(x, f)"), f=np.ones(1), **STORED), "Conv")
    assert weight_decoding(floats) is None
    assert own_weight(floats) is None
    shared = parse(CONV.replace("}", "k = DequantizeLinear<axis=0>(q, s) }"), **STORED)
    assert own_weight(node(shared, "Conv")) is None


def test_a_layers_weights_are_found_by_its_path():
    text = CONV.replace("(q, s)", "(r, s)").replace("{", "{ t = Transpose(q) r = Transpose(t)")
    model = parse(text, **STORED)
    assert list(stored_weights(model.graph)) == []
    node(model, "Conv").metadata_props[LAYER] = "body.0"
    ((path, weight),) = stored_weights(model.graph)
    assert (path, weight.name) == ("body.0", "q")
    node(model, "DequantizeLinear").metadata_props[LAYER] = "other"  # no matrix node
    assert dict(stored_weights(model.graph)).keys() == {"body.0"}


def test_reasons_are_logged(caplog: pytest.LogCaptureFixture):
    text = "(float[9] x) => (float[a] y) { m = Slice(x, o, n, z) y = Slice(m, o, n, z) }"
    model = parse(text, o=[1], n=[8], z=[0])
    with caplog.at_level(logging.DEBUG, "mpq.export.edit"):
        assert run(model, [JOIN_SLICES, merge_groups]) == 0
    assert "JoinSlices does not apply: both cut axis 0" in caplog.text
