"""Each reason for float, on the smallest file that has it: integers without it, float with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq.export import runtime
from mpq.export.certify import certify

RNG = np.random.default_rng(0)
SIDE, CHANNELS = 8, 8


class File:
    """A QDQ file of one layer; every option is one detail that can be wrong."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any, kind: int | None = None) -> str:
        name = f"c{len(self.constants)}"
        tensor = numpy_helper.from_array(np.asarray(array), name)
        if kind is not None:
            array = np.asarray(array)
            tensor = helper.make_tensor(name, kind, array.shape, array.reshape(-1).tolist())
        self.constants.append(tensor)
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], name=out, **attributes))
        return out

    def quantized(self, x: str, scale: float, zero: Any) -> str:
        s, z = self.constant(np.float32(scale)), self.constant(zero)
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, s, z), s, z)

    def bytes(self, out: str, shape: list[int]) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(out, TensorProto.FLOAT, None)],
            self.constants,
        )
        opsets = [helper.make_opsetid("", 21)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def conv(  # noqa: PLR0913 - one argument for each detail that can be wrong
    *,
    zero: Any = None,
    out_zero: Any = None,
    weight_kind: int = TensorProto.INT8,
    clamp: str = "Relu",
    bounds: tuple[float, float] = (0.0, 6.0),
    out_scale: float = 6 / 255,
    bias_factor: float | None = 1.0,
    quantize_input: bool = True,
    quantize_output: bool = True,
    readers: int = 1,
    float_weights: bool = False,
) -> bytes:
    file, zero = File(), np.uint8(0) if zero is None else zero
    x = file.quantized("x", 0.02, zero) if quantize_input else file.node("Sigmoid", "x")
    scales = np.full(CHANNELS, 0.01, np.float32)
    integers = RNG.integers(-7, 8, (CHANNELS, 3, 3, 3)) + 7 * (weight_kind == TensorProto.UINT8)
    if float_weights:
        w = file.constant(integers.astype(np.float32) * 0.01)
    else:
        w = file.node(
            "DequantizeLinear",
            file.constant(integers, weight_kind),
            file.constant(scales),
            *([file.constant(np.zeros(CHANNELS, np.uint8))] * (weight_kind == TensorProto.UINT8)),
            axis=0,
        )
    inputs = [x, w]
    if bias_factor is not None:
        b = file.constant(RNG.integers(-50, 50, CHANNELS).astype(np.int32))
        scale = np.float32(0.02 * bias_factor) * scales
        inputs.append(file.node("DequantizeLinear", b, file.constant(scale), axis=0))
    y = out = file.node("Conv", *inputs)
    if clamp == "Relu":
        out = file.node("Relu", out)
    elif clamp:
        limits = [file.constant(np.float32(b)) for b in bounds]
        out = file.node("Clip", out, *limits)
    if quantize_output:
        out = file.quantized(out, out_scale, zero if out_zero is None else out_zero)
    for _ in range(readers - 1):
        out = file.node("Add", out, y)
    return file.bytes(out, [1, 3, SIDE, SIDE])


def gemm(*, zero_points: bool = True, after: tuple[str, ...] = ()) -> bytes:
    file = File()
    x = file.quantized("x", 0.02, np.uint8(128))
    w = file.constant(RNG.integers(-100, 100, (4, 16)).astype(np.int8))
    decoding = [w, file.constant(np.linspace(0.01, 0.02, 4, dtype=np.float32))]
    if zero_points:
        decoding.append(file.constant(np.zeros(4, np.int8)))
    out = file.node("Gemm", x, file.node("DequantizeLinear", *decoding, axis=0), transB=1)
    for op in after:
        bounds = [file.constant(np.float32(b)) for b in (0, 6)] if op == "Clip" else []
        quantize = op == "Quantize"
        out = file.quantized(out, 0.05, np.uint8(3)) if quantize else file.node(op, out, *bounds)
    return file.bytes(out, [1, 16])


RIGHT = [
    conv(),
    conv(zero=np.int8(-128)),
    conv(clamp="Clip"),
    conv(clamp="Clip", out_scale=0.02),
    conv(out_zero=np.int8(-128)),
    conv(zero=np.int8(-128), weight_kind=TensorProto.UINT8),
    conv(clamp=""),
    conv(bias_factor=None),
    conv(bias_factor=1.005),
    gemm(),
    gemm(after=("Relu",)),
    gemm(after=("Quantize",)),
    gemm(after=("Softplus", "Relu")),
]
WRONG = {
    "a Relu before a QuantizeLinear of zero point 0: it is absorbed only at -128": conv(
        zero=np.int8(0)
    ),
    "a Clip to 0..6 before a range of 0..7.65: it is absorbed only": conv(
        clamp="Clip", out_scale=0.03
    ),
    "the scale of its bias differs by 10%": conv(bias_factor=1.1),
    "INT4 straight into DequantizeLinear": conv(weight_kind=TensorProto.INT4),
    "INT16 weights have no integer kernel": conv(weight_kind=TensorProto.INT16, bias_factor=None),
    "UINT16 activations have no integer kernel": conv(zero=np.uint16(0)),
    "its input is not quantized: Sigmoid writes it in float": conv(quantize_input=False),
    "its output leaves the network in float": conv(quantize_output=False, clamp=""),
    "its output is read by 2 nodes": conv(readers=2, clamp=""),
    "its weights are FLOAT, not integers": conv(float_weights=True, quantize_output=False),
    "needs its weight zero points written out": gemm(zero_points=False),
    "its output behind a Relu is not quantized: Softplus": gemm(after=("Relu", "Softplus")),
    "its output behind a Clip is not quantized: Softplus": gemm(after=("Clip", "Softplus")),
    "a Relu before a QuantizeLinear of zero point 3": gemm(after=("Relu", "Quantize")),
    "a Clip to 0..6 before a range of -0.15..12.6": gemm(after=("Clip", "Quantize")),
}


@pytest.mark.parametrize("data", RIGHT)
def test_a_file_that_is_right_runs_as_integers(data: bytes):
    (row,) = certify(data).layers
    assert row.integer
    assert row.reason == ""


@pytest.mark.parametrize("reason", WRONG)
def test_a_detail_that_is_wrong_is_named(reason: str):
    (row,) = certify(WRONG[reason]).layers
    assert not row.integer
    assert reason in row.reason


def test_files_with_external_data_and_half_floats(tmp_path: Path):
    model = onnx.load_from_string(conv(float_weights=True, quantize_input=False))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 4:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
            weight = tensor.name
    cast = helper.make_node("Cast", [weight], ["wide"], to=TensorProto.FLOAT)
    convolution = next(n for n in model.graph.node if n.op_type == "Conv")
    convolution.input[1] = "wide"
    model.graph.node.insert(0, cast)
    path = tmp_path / "half.onnx"
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="half.bin")
    (row,) = certify(path).layers
    assert row.stored == "FLOAT16"
    assert "its FLOAT16 weights are expanded to float" in row.reason or "FLOAT16" in row.reason


def test_files_of_the_runtimes_own_quantizer(tmp_path: Path):
    source = tmp_path / "f.onnx"
    source.write_bytes(
        conv(float_weights=True, quantize_input=False, quantize_output=False, bias_factor=None)
    )
    feeds = [{"x": RNG.standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(3)]
    runtime.quantize_static(source, tmp_path / "q.onnx", feeds)
    (row,) = certify(tmp_path / "q.onnx").layers
    assert (row.executed, row.stored) == ("QLinearConv", "INT8")
