"""What was asked against what a file stores: every form of storage, right and wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

import nets
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from test_dynamic import vit
from test_export import model
from test_groups import Grouped
from test_upsample import LAYERS, Up
from torch import nn

from mpq.export import to_onnx
from mpq.export.certify import certify
from mpq.export.lower import form_for, lower
from mpq.export.meta import KEY, to_metadata
from mpq.export.onnx_file import serialize
from mpq.export.reasons import Wiring
from mpq.export.stored import Grid, stored_weights
from mpq.graph.annotate import make_dynamic, reading_groups
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.spec import QuantSpec
from mpq.targets import ONNXRUNTIME_AVX2, ONNXRUNTIME_CPU


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name == "up":
            return Up(LAYERS["odd"]()).eval()
        if name == "grouped":
            return Grouped().eval()
        return vit() if name == "attention" else model(name)


def quantized(name: str, policy: Policy, *, dynamic: bool = False) -> QuantGraph:
    floats = to_float(network(name), nets.images())
    graph = prepare(floats, make_dynamic(floats, policy) if dynamic else policy)
    calibrate(graph, nets.images(8), method="minmax")
    return freeze(graph)


def asking(weight: str, activation: str = "uint8/tensor", target: str | None = None) -> Policy:
    default = {"weight": weight, "activation": activation}
    named = {} if target is None else {"target": target}
    return Policy.model_validate({"default": default, **named})


def relabelled(data: bytes, policy: Policy) -> bytes:
    """The file with another policy inside: what it stores stays what it is."""
    proto = onnx.load_from_string(data)
    for entry in proto.metadata_props:
        if entry.key == KEY:
            entry.value = to_metadata(policy)
    return proto.SerializeToString()


@cache
def exported(
    name: str, weight: str, dynamic: bool, options: tuple[tuple[str, Any], ...]
) -> tuple[QuantGraph, bytes]:
    return written(name, asking(weight), dynamic=dynamic, **dict(options))


def written(
    name: str, policy: Policy, *, dynamic: bool = False, **options: Any
) -> tuple[QuantGraph, bytes]:
    graph = quantized(name, policy, dynamic=dynamic)
    return graph, serialize(lower(graph, form_for(graph, **options)))


UNPACK = {"int4_format": "unpack"}
FORMS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    # network, weights, options of the export, type in the file
    "cast": ("plain", "int4", {}, "INT4"),
    "dq": ("plain", "int4", {"int4_format": "dq"}, "INT4"),
    "int2": ("plain", "int2", {"min_runtime": "1.26"}, "INT2"),
    "two in bytes": ("plain", "int2", {}, "UINT8"),
    "three in bytes": ("plain", "int3", {}, "UINT8"),
    "four in bytes": ("plain", "int4", UNPACK, "UINT8"),
    "six in bytes": ("plain", "int6", {}, "UINT8"),
    "eight": ("plain", "int8", {}, "INT8"),
    "sixteen": ("plain", "int16", {}, "INT16"),
    "float": ("plain", "float", {}, "FLOAT"),
    "island": ("isle", "int4", {}, "INT4"),
    "island in bytes": ("isle", "int3", {}, "UINT8"),
    "interleaved": ("up", "int4", {}, "INT4"),
    "interleaved bytes": ("up", "int3", {"min_runtime": "1.18"}, "UINT8"),
    "transposed in groups": ("transposed", "int4", {}, "INT4"),
    "merged groups": ("grouped", "int4", {}, "INT4"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_stored_width_is_the_asked_one_or_the_file_is_broken(form: str):
    name, weight, options, kind = FORMS[form]
    text = weight if "/" in weight or weight == "float" else f"{weight}/channel"
    graph, data = exported(name, text, False, tuple(options.items()))
    bits = 32 if text == "float" else QuantSpec.parse(text).bits
    for certificate in (certify(data), certify(data, graph)):
        assert not certificate.broken()
        assert {(row.stored, row.stored_bits) for row in certificate.layers} == {(kind, bits)}
    other = "int4/channel" if bits == 8 else "int8/channel"
    broken = certify(relabelled(data, asking(other))).broken()
    assert [row.name for row in broken] == list(graph.layers)
    width = "" if text == "float" else f" of {bits} bits"
    told = f"asked for W{other[3]}A8, but the file stores {kind}{width} in place of {other[3]}"
    assert all(told in row.reason for row in broken)


def test_a_layer_that_is_asked_for_in_float_stores_floats():
    graph, data = exported("plain", "int8/channel", False, ())
    broken = certify(relabelled(data, asking("float"))).broken()
    assert [row.name for row in broken] == list(graph.layers)
    assert "asked for W32A8, but the file stores INT8 in place of floats" in broken[0].reason


@pytest.mark.parametrize("bits", [3, 8])
def test_dynamic_layers_too(bits: int):
    graph, data = exported("attention", f"int{bits}/channel", True, ())
    assert not certify(data).broken()
    rows = certify(data, graph).layers
    assert {row.stored_bits for row in rows} == {bits}
    assert sum("dynamic" in row.asked for row in rows) == len(rows) - 1
    assert graph.policy is not None
    other = asking("int5/channel").replace(layers=graph.policy.layers)
    broken = certify(relabelled(data, other)).broken()
    assert [row.name for row in broken] == list(graph.layers)


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("name", ["plain", "isle", "residual", "up"])
def test_the_grid_of_a_layer_is_the_asked_one_or_the_file_is_broken(name: str, bits: int):
    """A file of 8-bit activations under a policy that asks for 4 was certified as W8A4."""
    graph, data = written(name, asking("int8/channel", f"uint{bits}/tensor"))
    for certificate in (certify(data), certify(data, graph)):
        assert {row.asked for row in certificate.layers} == {f"W8A{bits}"}
        assert not certificate.broken()
        assert not any(row.reason for row in certificate.layers)
    other = 8 if bits == 4 else 4
    broken = certify(relabelled(data, asking("int8/channel", f"uint{other}/tensor"))).broken()
    assert [row.name for row in broken] == list(graph.layers)
    told = f"asked for W8A{other}, but the file rounds its input on {bits} bits in place of {other}"
    assert all(told in row.reason for row in broken)


def test_a_shared_grid_has_the_widest_width_and_says_so():
    floats = to_float(network("concat"), nets.images())
    first, second = next(names for names in reading_groups(floats) if len(names) == 2)
    narrow = asking("int8/channel", "uint4/tensor")
    policy = narrow.with_layers(LayerPolicy(name=first, activation="uint6/tensor"))
    graph, data = written("concat", policy)
    rows = {row.name: row for row in certify(data).layers}
    assert not certify(data, graph).broken()
    assert rows[first].reason == ""
    assert rows[second].reason == "reads a tensor that another layer needs at 6 bits"
    broken = {row.name: row for row in certify(relabelled(data, narrow)).broken()}
    assert set(broken) == {first, second}
    assert "rounds its input on 6 bits in place of 4" in broken[second].reason


def test_a_fixed_range_is_none_that_is_found_at_run_time():
    for dynamic, found in ((True, "at run time"), (False, "as a constant")):
        _, data = exported("attention", "int8/channel", dynamic, ())
        other, _ = exported("attention", "int8/channel", not dynamic, ())
        assert other.policy is not None
        broken = certify(relabelled(data, other.policy)).broken()
        assert broken
        assert all(f"has the range of its input {found}" in row.reason for row in broken)


def test_seven_bits_of_eight_are_held_to():
    narrow = asking("int8/channel", target=ONNXRUNTIME_AVX2.name)
    wide = asking("int8/channel", target=ONNXRUNTIME_CPU.name)
    graph = quantized("plain", narrow)
    data = serialize(lower(graph))
    assert not certify(data, graph).broken()
    full = quantized("plain", wide)
    too_wide = relabelled(serialize(lower(full)), narrow)
    swapped = full.copy()
    swapped.policy, swapped.plans = graph.policy, graph.plans
    broken = certify(too_wide, swapped).broken()
    assert [row.name for row in broken] == list(graph.layers)
    assert all("beyond the -64 to 63 of weights that take 7 bits" in row.reason for row in broken)


def test_a_policy_without_a_target_says_nothing_of_the_range():
    """Who made the file had another computer, perhaps: its range was right there."""
    _, data = exported("plain", "int8/channel", False, ())
    proto = onnx.load_from_string(data)
    for entry in proto.metadata_props:
        if entry.key == KEY:
            entry.value = '{"policy": {"version": 1}}'
    assert not certify(proto.SerializeToString(), target=ONNXRUNTIME_AVX2.name).broken()


def test_nobody_can_export_under_another_policy(tmp_path):
    """`to_onnx(graph_at_W4, policy=W8)` wrote a file that was certified as asked W8A8."""
    graph = quantized("plain", Policy.uniform(4))
    with pytest.raises(TypeError, match="policy"):
        to_onnx(graph, tmp_path / "m.onnx", policy=Policy.uniform(8))
    path = to_onnx(graph, tmp_path / "m.onnx").path
    assert {(r.asked, r.stored) for r in certify(path).layers} == {("W4A8", "INT4")}
    data = relabelled(path.read_bytes(), Policy.uniform(8))
    assert len(certify(data).broken()) == len(graph.layers)
    assert graph.copy().policy == graph.policy == Policy.uniform(4)


def test_one_wrong_layer_is_named():
    graph, data = exported("plain", "int8/channel", False, ())
    first = next(iter(graph.layers))
    layers = [LayerPolicy(name=first, weight="int4/channel")]
    broken = certify(relabelled(data, Policy(layers=layers))).broken()
    assert [row.name for row in broken] == [first]
    assert "stores INT8 of 8 bits in place of 4" in broken[0].reason


# -- the decoding ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (Grid(0), 32),
        (Grid(0xFF, 128), 8),
        (Grid(0xFF), 8),
        (Grid(0xF, 8), 4),
        (Grid(0b111, 4), 3),
        (Grid(0b111, 3), 4),
        (Grid(0b101, 4), 3),
        (Grid(0xFFFF, 1 << 15), 16),
    ],
)
def test_the_width_of_a_range(grid: Grid, bits: int):
    assert grid.bits == bits


def stored(*nodes: onnx.NodeProto, **arrays: Any) -> int:
    """Width of the weights `w` that a decoding makes of bytes `p`."""
    constants = {"p": torch.zeros(4, dtype=torch.uint8), **arrays}
    tensors = [numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()]
    conv = helper.make_node("Conv", ["x", "w"], ["y"])
    graph = helper.make_graph([*nodes, conv], "g", [], [], tensors)
    return stored_weights(conv, tensors[0], Wiring(graph)).bits


def test_bits_are_counted_where_they_are_decoded():
    def node(op: str, *names: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, names[:-1], [names[-1]], **attributes)

    mask = torch.tensor(7, dtype=torch.uint8)
    half, one = torch.tensor(4, dtype=torch.int32), torch.tensor(3, dtype=torch.uint8)
    wide = node("Cast", "a", "b", to=TensorProto.INT32)
    ends = [wide, node("Sub", "b", "half", "w")]
    masked = node("BitwiseAnd", "p", "mask", "a")
    assert stored(masked, *ends, mask=mask, half=half) == 3
    plain = node("Identity", "p", "a")
    assert stored(plain, *ends, half=half) == 9  # 0 to 255, less 4: it is no 3-bit weight
    raised = node("BitShift", "p", "one", "q", direction="RIGHT")
    assert stored(raised, node("Identity", "q", "w"), one=one) == 5
    left = node("BitShift", "p", "one", "q", direction="LEFT")
    assert stored(left, node("Identity", "q", "w"), one=one) == 8
    both = node("BitwiseOr", "p", "p", "w")
    assert stored(both) == 8
    assert stored(node("Abs", "p", "w")) == 0  # not known: no width is believed
    strange = node("BitwiseAnd", "p", "p", "w")
    assert stored(strange) == 8
