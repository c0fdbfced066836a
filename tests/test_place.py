"""Placement passes on a few lines of ONNX: another order of the nodes, the same answers."""

from __future__ import annotations

import numpy as np
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnxtext import answer, node, ops, parse

from mpq.export.edit import SITE
from mpq.export.groups import merge_groups
from mpq.export.place import guard, sink
from mpq.export.upsample import lift_quantizers

RNG = np.random.default_rng(0)
STORED = {"q": np.ones((8, 4, 3, 3), np.int8), "s": np.ones(8, np.float32)}
X = np.arange(144, dtype=np.float32).reshape(1, 4, 6, 6)
UPSAMPLING = """(float[1,4,6,6] x) => (float[1,2,8,7] y) {
    w = DequantizeLinear<axis=0>(q, s)
    c = Conv(x, w)
    d = DepthToSpace<blocksize=2, mode="CRD">(c)
    k = Slice(d, zero, seven, three)
    r = Relu(k)
    e = QuantizeLinear(r, t, z)
    l = Clip(e, z, top)
    y = DequantizeLinear(l, t, z)
}"""
CROP = {"zero": [0], "seven": [7], "three": [3]}
GRID = {"t": np.float32(9), "z": np.uint8(0), "top": np.uint8(15)}


def test_quantizers_move_before_the_interleaving():
    model = parse(UPSAMPLING, **STORED, **CROP, **GRID)
    node(model, "QuantizeLinear").metadata_props[SITE] = "quantizers.up"
    before = answer(model, x=X)
    assert lift_quantizers(model.graph) == 3
    order = ["Conv", "Relu", "QuantizeLinear", "Clip", "DepthToSpace", "Slice", "DequantizeLinear"]
    assert ops(model) == ["DequantizeLinear", *order]
    assert np.array_equal(answer(model, x=X), before)
    # what has the integers of the site is now the crop
    assert [n.op_type for n in model.graph if SITE in n.metadata_props] == ["Slice"]


def test_quantizers_after_a_float_layer_stay():
    text = UPSAMPLING.replace("Conv(x, w)", "Conv(x, f)")
    model = parse(text, f=np.ones((8, 4, 3, 3), np.float32), **STORED, **CROP, **GRID)
    assert lift_quantizers(model.graph) == 0


def test_groups_are_spread_over_zeros():
    text = """(float[1,48,5,5] x) => (float[1,48,3,3] y) {
        w = DequantizeLinear<axis=0>(q, s)
        y = Conv<group=12>(x, w)
    }"""
    weight = RNG.integers(-128, 128, (48, 4, 3, 3)).astype(np.int8)
    model = parse(text, q=weight, s=np.ones(48, np.float32))
    x = RNG.integers(0, 9, (1, 48, 5, 5)).astype(np.float32)
    before = answer(model, x=x)
    assert merge_groups(model.graph) == 1
    assert node(model, "Conv").attributes.get_int("group") < 12
    assert np.array_equal(answer(model, x=x), before)


def test_decoding_sinks_below_what_moves_values():
    text = """(uint8[1,4,6,6] x) => (float[a,b,c,d] y) {
        f = DequantizeLinear(x, s, z)
        p = Pad(f, pads)
        m = MaxPool<kernel_shape=[2,2]>(p)
        y = Relu(m)
    }"""
    model = parse(text, s=np.float32(0.5), z=np.uint8(7), pads=[0, 0, 1, 1, 0, 0, 1, 1])
    before = answer(model, x=X.astype(np.uint8))
    assert sink(model.graph) == 2
    RemoveUnusedNodesPass()(model)
    assert ops(model) == ["Pad", "MaxPool", "DequantizeLinear", "Relu"]
    assert np.array_equal(answer(model, x=X.astype(np.uint8)), before)


def test_only_float_layers_before_a_quantizer_are_guarded():
    text = """(float[1,4,6,6] x) => (uint8[1,8,4,4] y) {
        w = DequantizeLinear<axis=0>(q, s)
        c = Conv(x, w)
        r = Relu(c)
        y = QuantizeLinear(r, t, z)
    }"""
    grid = {"t": np.float32(0.5), "z": np.uint8(0), "f": np.ones((8, 4, 3, 3), np.float32)}
    integers_of = parse(text, **STORED, **grid)
    assert guard(integers_of.graph) == 0
    floats = parse(text.replace("Conv(x, w)", "Conv(x, f)"), **STORED, **grid)
    before = answer(floats, x=X)
    assert guard(floats.graph) == 1
    assert ops(floats) == ["DequantizeLinear", "Conv", "Max", "QuantizeLinear"]
    assert np.array_equal(answer(floats, x=X), before)
