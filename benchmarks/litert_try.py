"""The integers of an mpq file as a .tflite: answers, bytes and speed in LiteRT.

`python benchmarks/litert_try.py RUN [--int4]` in an environment with `ai-edge-litert` beside mpq
writes `build/litert/*.tflite` from RUN/model.onnx (a ResNet of convolutions, additions, a shortcut
that drops and pads channels, a mean and a linear layer; nothing else is known to it) and from
RUN/float.onnx's speed in onnxruntime says what it is worth. 8-bit weights are INT8, of 4 bits INT4
with `--int4`. It prints one row of `rows/other_runtimes.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as lite
from ai_edge_litert.interpreter import Interpreter
from onnx import helper, numpy_helper

from mpq.data import Normalization, open_data, sample_indices
from mpq.export import runtime
from mpq.export.fileinfo import file_info

ROOT = Path(__file__).resolve().parents[1]
DATA, OUT = ROOT.parent / "shared" / "data", ROOT / "build" / "litert"
TYPES = {"float32": lite.TensorType.FLOAT32, "int8": lite.TensorType.INT8,
         "int32": lite.TensorType.INT32}  # fmt: skip
OPS = lite.BuiltinOperator
VERSIONS = {OPS.CONV_2D: 5, OPS.FULLY_CONNECTED: 1, OPS.RESHAPE: 1, OPS.QUANTIZE: 1}
"""Of operators, where not 2."""
TEST, RUNS = 512, 60


class Writer:
    """A .tflite of one graph: tensors, their data, and operators in order."""

    def __init__(self) -> None:
        self.graph = lite.SubGraphT()
        self.graph.tensors, self.graph.operators = [], []
        self.buffers, self.codes = [lite.BufferT()], []

    def tensor(self, name: str, shape: Any, kind: int, quant: Any = None, data: Any = None) -> int:
        """A tensor; `quant` is scales, zero points and the axis they lie along."""
        one = lite.TensorT()
        one.name, one.shape, one.type, one.buffer = name.encode(), list(shape), kind, 0
        if data is not None:
            buffer = lite.BufferT()
            buffer.data = np.frombuffer(data, np.uint8)
            self.buffers.append(buffer)
            one.buffer = len(self.buffers) - 1
        if quant is not None:
            scale, zero, axis = quant
            said = one.quantization = lite.QuantizationParametersT()
            said.scale = np.atleast_1d(np.asarray(scale, np.float32))
            said.zeroPoint = np.broadcast_to(np.asarray(zero, np.int64), said.scale.shape)
            said.quantizedDimension = axis
        self.graph.tensors.append(one)
        return len(self.graph.tensors) - 1

    def constant(self, name: str, array: Any, quant: Any = None, *, int4: bool = False) -> int:
        """A stored tensor; 4-bit values lie two in a byte, the first in its low bits."""
        data, kind = np.ascontiguousarray(array), TYPES[str(array.dtype)]
        if int4:
            flat = np.resize(data.reshape(-1), data.size + data.size % 2).view(np.uint8) & 15
            data, kind = flat[::2] | flat[1::2] << 4, lite.TensorType.INT4
        return self.tensor(name, array.shape, kind, quant, data.tobytes())

    def op(self, code: int, inputs: list[int], output: int, name: str = "", **options: Any) -> int:
        """An operator with one output."""
        known = [c.builtinCode for c in self.codes]
        if code not in known:
            one = lite.OperatorCodeT()
            one.builtinCode, one.deprecatedBuiltinCode = code, min(code, 127)
            one.version = VERSIONS.get(code, 2)
            self.codes.append(one)
            known.append(code)
        made = lite.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = known.index(code), inputs, [output]
        if name:
            made.builtinOptionsType = getattr(lite.BuiltinOptions, name)
            made.builtinOptions = getattr(lite, f"{name}T")()
            for key, value in options.items():
                setattr(made.builtinOptions, key, value)
        self.graph.operators.append(made)
        return output

    def finish(self, first: int, last: int) -> bytes:
        """The file."""
        self.graph.inputs, self.graph.outputs, model = [first], [last], lite.ModelT()
        model.version, model.subgraphs, model.buffers = 3, [self.graph], self.buffers
        model.operatorCodes = self.codes
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class Converter:
    """An mpq file of a ResNet, node by node: uint8 with zero point z is int8 with z - 128."""

    def __init__(self, path: Path, *, int4: bool) -> None:
        model = onnx.shape_inference.infer_shapes(onnx.load(path))
        self.graph, self.int4, self.write = model.graph, int4, Writer()
        self.stored = {t.name: numpy_helper.to_array(t) for t in self.graph.initializer}
        self.makers = {out: n for n in self.graph.node for out in n.output}
        self.readers = {i: n for n in self.graph.node for i in n.input}
        self.shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim]
                       for v in [*self.graph.value_info, *self.graph.input]}  # fmt: skip
        self.known: dict[str, int] = {}

    def run(self) -> bytes:
        """Convert every node that writes integers, and the last layer."""
        start = self.graph.input[0].name
        first = self.write.tensor(start, self.nhwc(start), lite.TensorType.FLOAT32)
        self.known[start] = first
        for node in self.graph.node:
            if node.op_type == "QuantizeLinear":
                self.quantized(node)
            elif node.op_type in ("Slice", "Pad", "Reshape"):
                self.moved(node)
            elif node.op_type == "Gemm":
                last = self.linear(node)
        return self.write.finish(first, last)

    def nhwc(self, name: str) -> list[int]:
        """The shape of a value, channels last."""
        rest = self.shapes[name][1:]
        return [1, *rest[1:], rest[0]] if len(rest) == 3 else [1, *rest]

    def constant(self, name: str) -> Any:
        """A stored array, through the Cast of a 4-bit type."""
        return self.stored[name if name in self.stored else self.makers[name].input[0]]

    def output(self, node: Any) -> int:
        """The tensor that a QuantizeLinear writes."""
        scale, zero = (self.stored[i] for i in node.input[1:3])
        made = self.write.tensor(node.output[0], self.nhwc(node.output[0]), TYPES["int8"],
                                 (scale, int(zero) - 128, 0))  # fmt: skip
        self.known[node.output[0]] = made
        return made

    def source(self, name: str) -> int:
        """The integers behind a value that a DequantizeLinear gives."""
        return self.known[self.makers[name].input[0]]

    def quantized(self, node: Any) -> None:
        """A layer, an addition or a mean up to its quantizer."""
        before = self.makers.get(node.input[0])
        if before is None:
            self.write.op(OPS.QUANTIZE, [self.known[node.input[0]]], self.output(node))
            return
        while before.op_type == "Relu":  # the range of the output says as much
            before = self.makers[before.input[0]]
        if before.op_type == "Conv":
            self.convolution(before, node)
        elif before.op_type == "Add":
            inputs = [self.source(i) for i in before.input]
            self.write.op(OPS.ADD, inputs, self.output(node), "AddOptions")
        else:
            axes = self.write.constant(f"{node.output[0]}.axes", np.array([1, 2], np.int32))
            inputs = [self.source(before.input[0]), axes]
            self.write.op(OPS.MEAN, inputs, self.output(node), "ReducerOptions", keepDims=True)

    def convolution(self, conv: Any, out: Any) -> None:
        """A convolution; other padding than SAME's comes before it."""
        decode, bias = (self.makers[i] for i in conv.input[1:3])
        raw, scale = self.constant(decode.input[0]), self.stored[decode.input[1]]
        narrow = self.int4 and "int4" in str(raw.dtype)
        weight = raw.astype(np.int8).transpose(0, 2, 3, 1)
        x, stride = self.source(conv.input[0]), self.attribute(conv, "strides", [1, 1])
        wide = self.attribute(conv, "pads", [0] * 4)
        same = stride == [1, 1] and wide == [weight.shape[1] // 2] * 4
        if any(wide) and not same:
            x = self.padded(x, [[0, 0], wide[::2], wide[1::2], [0, 0]])
        inside = self.write.graph.tensors[x].quantization.scale[0]
        w = self.write.constant(f"{conv.name}.w", np.ascontiguousarray(weight), (scale, 0, 0),
                                int4=narrow)  # fmt: skip
        b = self.write.constant(f"{conv.name}.b", self.stored[bias.input[0]],
                                (inside * scale, 0, 0))  # fmt: skip
        self.write.op(OPS.CONV_2D, [x, w, b], self.output(out), "Conv2DOptions",
                      padding=lite.Padding.SAME if same else lite.Padding.VALID,
                      strideH=stride[0], strideW=stride[1])  # fmt: skip

    def attribute(self, node: Any, name: str, default: Any) -> Any:
        """An attribute of a node."""
        found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return list(found.get(name, default))

    def padded(self, x: int, pads: Any) -> int:
        """A tensor with its zero around it."""
        old, wide = self.write.graph.tensors[x], np.array(pads, np.int32)
        said = old.quantization
        made = self.write.tensor(f"{old.name.decode()}.{x}.padded",
                                 np.array(old.shape) + wide.sum(1), old.type,
                                 (said.scale, said.zeroPoint[0], 0))  # fmt: skip
        sizes = self.write.constant(f"pads.{made}", wide)
        return self.write.op(OPS.PAD, [x, sizes], made, "PadOptions")

    def moved(self, node: Any) -> None:
        """Integers that are moved keep their scale."""
        x = self.known[node.input[0]]
        old = self.write.graph.tensors[x]
        if node.op_type == "Pad":
            wide = self.stored[node.input[1]].reshape(2, -1).T
            if len(wide) == 4:
                wide = wide[[0, 2, 3, 1]]
            self.known[node.output[0]] = self.padded(x, wide)
            return
        made = self.write.tensor(node.output[0], self.nhwc(node.output[0]), old.type,
                                 (old.quantization.scale, old.quantization.zeroPoint[0], 0)
                                 )  # fmt: skip
        shape = list(self.write.graph.tensors[made].shape)
        if node.op_type == "Reshape":
            size = self.write.constant(f"shape.{made}", np.array(shape, np.int32))
            self.known[node.output[0]] = self.write.op(OPS.RESHAPE, [x, size], made)
            return
        steps = [1, 1, 1, 1]
        for axis, step in zip(*(self.stored[i].tolist() for i in node.input[3:5]), strict=True):
            steps[{2: 1, 3: 2}[axis]] = step
        ends = [list(old.shape), steps]
        rest = [self.write.constant(f"slice.{made}.{i}", np.array(v, np.int32))
                for i, v in enumerate([[0] * 4, *ends])]  # fmt: skip
        self.known[node.output[0]] = self.write.op(
            OPS.STRIDED_SLICE, [x, *rest], made, "StridedSliceOptions")  # fmt: skip

    def linear(self, node: Any) -> int:
        """The last layer in floats: its own range is not known to the file."""
        x, (decode, bias) = self.source(node.input[0]), (self.makers[i] for i in node.input[1:3])
        raw, scale = self.constant(decode.input[0]).astype(np.float32), self.stored[decode.input[1]]
        inside = self.write.graph.tensors[x].quantization.scale[0]
        shape = self.write.graph.tensors[x].shape
        floats = self.write.op(OPS.DEQUANTIZE, [x],
                               self.write.tensor("floats", shape, TYPES["float32"]))  # fmt: skip
        w = self.write.constant("linear.w", raw * scale[:, None])
        shift = (self.stored[bias.input[0]] * inside * scale).astype(np.float32)
        b = self.write.constant("linear.b", shift)
        out = self.write.tensor("logits", [1, len(raw)], TYPES["float32"])
        return self.write.op(OPS.FULLY_CONNECTED, [floats, w, b], out, "FullyConnectedOptions")


def asked(path: Path, images: Any) -> tuple[Any, float]:
    """Logits of each image, and the median CPU milliseconds of a run with one thread."""
    found, times = [], []
    ready = Interpreter(str(path), num_threads=1)
    ready.allocate_tensors()
    first, last = ready.get_input_details()[0]["index"], ready.get_output_details()[0]["index"]
    for image in images.transpose(0, 2, 3, 1):
        ready.set_tensor(first, image[None])
        begun = time.thread_time()
        ready.invoke()
        times.append(1e3 * (time.thread_time() - begun))
        found.append(ready.get_tensor(last).copy())
    return np.concatenate(found), float(np.median(times[-RUNS:]))


def speed(path: Path, image: Any) -> float:
    """Median CPU milliseconds in onnxruntime."""
    loaded, times = runtime.session(path), []
    for _ in range(RUNS):
        begun = time.thread_time()
        loaded.run(None, {loaded.get_inputs()[0].name: image})
        times.append(1e3 * (time.thread_time() - begun))
    return float(np.median(times))


def main() -> None:
    """Convert, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--int4", action="store_true")
    said = parser.parse_args()
    source = said.run / "model.onnx"
    path = OUT / f"{'int4' if said.int4 else 'int8'}.tflite"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(Converter(source, int4=said.int4).run())
    data, norm = open_data("cifar10", root=DATA), Normalization.parse(file_info(source).normalize)
    chosen = sample_indices(data.compared, TEST, 0)
    images, labels = norm.apply(data.compared.read(chosen)), np.asarray(data.compared.labels)
    wanted = runtime.run(runtime.session(source), images)
    answer, ms = asked(path, images)
    plain, own = (speed(said.run / f, images[:1]) for f in ("float.onnx", "model.onnx"))
    print(json.dumps({
        "runtime": f"litert {version('ai-edge-litert')}", "weights": path.stem,
        "bytes": path.stat().st_size, "onnx_bytes": source.stat().st_size, "n": TEST,
        "same_class": int((answer.argmax(1) == wanted.argmax(1)).sum()),
        "top1": round(100 * float((answer.argmax(1) == labels[chosen]).mean()), 2),
        "onnx_top1": round(100 * float((wanted.argmax(1) == labels[chosen]).mean()), 2),
        "ms": round(ms, 3), "onnxruntime_float_ms": round(plain, 3),
        "onnxruntime_ms": round(own, 3), "ratio_to_onnxruntime_float": round(plain / ms, 2),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
