from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

import mpq
from mpq.export import runtime, to_onnx, trial
from mpq.export.edit import Writer
from mpq.export.unpack import encode, unpack


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_odd_widths_are_packed_in_the_file_and_run_as_integers(bits: int, tmp_path: Path) -> None:
    torch.manual_seed(bits)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip
    images = torch.randn(32, 3, 12, 12)
    policy = mpq.Policy.uniform(bits, 8)
    graph = mpq.quantize_graph(mpq.prepare(net, policy, images), images)
    result = to_onnx(graph, tmp_path / "net.onnx", images=images)
    assert {row.executed for row in result.certificate.layers} == {"QLinearConv", "QGemm"}
    assert {row.stored for row in result.certificate.layers} == {"UINT8"}
    weights = sum(layer.params for layer in graph.layers.values())
    assert result.bytes < weights * bits / 8 + 7_000


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_a_layer_folds_where_its_widest_integers_are_within_a_bound(
    bits: int, tmp_path: Path
) -> None:
    """docs/portability.md: 4 bytes a weight, so 2**28 weights within onnxruntime's 1 GiB."""
    weights = np.ones((64, 32), np.int8)
    x = ir.val("x", ir.DataType.INT8, ir.Shape([64, 32]))
    last = ir.node("Identity", [x])
    graph = ir.Graph([x], [last.outputs[0]], nodes=[last], opset_imports={"": 18}, name="folding")
    [read] = unpack(Writer(graph, last), [weights], bits)
    both = ir.node("Concat", [x, read], attributes={"axis": 0})
    graph.insert_before(last, both)
    last.replace_input_with(0, both.outputs[0])
    data = ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString()
    for bound, folded in ((4 * weights.size, True), (4 * weights.size - 1, False)):
        options = ort.SessionOptions()
        key = "optimization.constant_folding_max_output_size_in_bytes"
        options.add_session_config_entry(key, str(bound))
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        ops = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
        assert ("Sub" not in ops) == folded, ops


def packed(tmp_path: Path, weights: list[np.ndarray], bits: int) -> Path:
    """A file that does nothing but unpack."""
    x = ir.val("x", ir.DataType.INT8, ir.Shape([1, 8]))
    last = ir.node("Identity", [x])
    graph = ir.Graph([x], [last.outputs[0]], nodes=[last], opset_imports={"": 18}, name="unpacking")
    graph.outputs.extend(unpack(Writer(graph, last), weights, bits))
    for number, value in enumerate(graph.outputs):
        value.name, value.dtype = f"y{number}", ir.DataType.INT8
    path = tmp_path / "packed.onnx"
    path.write_bytes(ir.to_proto(ir.Model(graph, ir_version=8)).SerializeToString())
    return path


@pytest.mark.parametrize("bits", range(2, 8))
def test_layers_of_a_width_are_unpacked_together(bits: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(bits)
    high = 1 << (bits - 1)
    weights = [
        rng.integers(-high, high, shape).astype(np.int8)
        for shape in [(3, 5, 3, 3), (7, 1), (8,), (1, 1)]
    ]
    count = sum(one.size for one in weights)
    planes = encode(np.zeros(count, np.int8), bits)
    assert sum(plane.nbytes for plane in planes) == -(-count // 8) * bits
    path = packed(tmp_path, weights, bits)
    _, *found = runtime.session(path).run(None, {"x": np.zeros((1, 8), np.int8)})
    for one, read in zip(weights, found, strict=True):
        assert np.array_equal(one, read)


def test_another_layer_of_a_packed_width_costs_few_bytes(tmp_path: Path) -> None:
    weights = [np.zeros((8, 8, 3, 3), np.int8)] * 9
    sizes = [packed(tmp_path, weights[:n], 5).stat().st_size for n in (8, 9)]
    assert sizes[1] - sizes[0] < 8 * 8 * 9 * 5 / 8 + 160  # names not yet made short


def test_weights_of_two_bits_are_within_the_limits_of_what_is_constant(tmp_path: Path) -> None:
    """16.8 million of them: 4 MB that take 200 MB while they are loaded."""
    path = packed(tmp_path, [np.ones((2048, 2048), np.int8)] * 4, 2)
    assert path.stat().st_size < 4_300_000
    trial.hold(path)
