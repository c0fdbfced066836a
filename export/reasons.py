"""Why a layer of a file runs in float: what of the pattern that the runtime fuses is missing.

onnxruntime turns DequantizeLinear -> Conv or Gemm -> QuantizeLinear into one integer kernel if
every detail is right, and says nothing where one is not. Each check here is one such detail, in the
order in which a person would look for it; tests/test_reasons.py shows for each that the layer runs
in float with it and as integers without it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from mpq.spec import weight_spec
from mpq.target import Target

BIAS_TOLERANCE = 0.01
"""By how much the scale of a bias may differ from the product of the other two."""
_MOVES = ("Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze")
_NARROW = (TensorProto.INT4, TensorProto.UINT4, TensorProto.INT2, TensorProto.UINT2)
_WIDE = (TensorProto.INT16, TensorProto.UINT16)


class Wiring:
    """Who writes and who reads each value of a graph, and the constants."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.producers = {out: node for node in graph.node for out in node.output}
        self.readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.readers.setdefault(name, []).append(node)
        self.stored = {t.name: t for t in graph.initializer}
        self.outputs = {value.name for value in graph.output}

    def producer(self, name: str, skip: tuple[str, ...] = ()) -> onnx.NodeProto | None:
        """The node that writes a value, looking through operators of the types in `skip`."""
        node = self.producers.get(name)
        while node is not None and node.op_type in skip and node.input:
            node = self.producers.get(node.input[0])
        return node

    def array(self, name: str) -> NDArray[np.float64] | None:
        """A constant, small products of constants included; None for anything else."""
        if name in self.stored:
            tensor = self.stored[name]
            outside = tensor.data_location == TensorProto.EXTERNAL
            return None if outside else np.asarray(numpy_helper.to_array(tensor), np.float64)
        node = self.producers.get(name)
        if node is None:
            return None
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            return np.asarray(numpy_helper.to_array(node.attribute[0].t), np.float64)
        if node.op_type == "Mul":
            factors = [self.array(i) for i in node.input]
            if factors[0] is not None and factors[1] is not None:
                return np.asarray(factors[0] * factors[1])
        return None

    def dtype(self, name: str) -> int:
        """Element type of a constant, 0 where it is none."""
        if name in self.stored:
            return int(self.stored[name].data_type)
        node = self.producers.get(name)
        constant = node is not None and node.op_type == "Constant"
        return int(node.attribute[0].t.data_type) if constant and node is not None else 0


def why_float(node: onnx.NodeProto, wiring: Wiring) -> str:
    """The first detail that keeps a matrix node from an integer kernel.

    Args:
        node: a Conv, ConvTranspose, Gemm or MatMul of the file that the runtime runs in float.
        wiring: of its graph.
    """
    return next(_details(node, wiring), "the runtime does not fuse it, for a reason unknown here")


def _details(node: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    decode = wiring.producer(node.input[1], _MOVES)
    if decode is None or decode.op_type != "DequantizeLinear":
        yield _undecoded(node, wiring)
        return
    if node.op_type == "ConvTranspose":
        yield "no integer kernel for transposed convolution"
    kind = _weight_type(decode, wiring)
    if kind in _NARROW:
        yield f"{_name(kind)} straight into DequantizeLinear: only 8-bit weights have a kernel"
    if kind in _WIDE:
        yield f"{_name(kind)} weights have no integer kernel"
    read = wiring.producer(node.input[0])
    if read is None or read.op_type != "DequantizeLinear":
        before = "the network's input" if read is None else read.op_type
        yield f"its input is not quantized: {before} writes it in float"
        return
    taken = _grid_type(read, wiring)
    if taken in _WIDE:
        yield f"{_name(taken)} activations have no integer kernel"
    yield from _bias(node, read, decode, wiring)
    if node.op_type == "Gemm":
        yield from _gemm(node, decode, wiring)
    # A product may end in floats, but behind a lone clamp a QuantizeLinear is looked for.
    readers = [n.op_type for n in wiring.readers.get(node.output[0], [])]
    if node.op_type == "Conv" or readers in (["Relu"], ["Clip"]):
        yield from _output(node, wiring)


def _undecoded(node: onnx.NodeProto, wiring: Wiring) -> str:
    name = node.input[1]
    before = wiring.producer(name, (*_MOVES, "Mul", "Cast"))
    while name in wiring.producers and wiring.producers[name].input:
        name = wiring.producers[name].input[0]
    kind = wiring.dtype(name)
    if before is None and kind in (0, TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16):
        return f"its weights are {_name(kind) if kind else 'computed'}, not integers"
    return f"its {_name(kind)} weights are expanded to float without DequantizeLinear"


def _name(kind: int) -> str:
    return TensorProto.DataType.Name(kind) if kind else "unknown"


def _weight_type(decode: onnx.NodeProto, wiring: Wiring) -> int:
    """Element type that a DequantizeLinear of weights reads."""
    name = decode.input[0]
    node = wiring.producer(name, _MOVES)
    while node is not None and node.op_type in _MOVES:
        node = wiring.producer(node.input[0])
    if node is not None and node.op_type == "Cast":
        return int(next(a.i for a in node.attribute if a.name == "to"))
    if node is not None and node.op_type == "QuantizeLinear":
        return _grid_type(node, wiring)
    while name in wiring.producers and wiring.producers[name].input:
        name = wiring.producers[name].input[0]
    return wiring.dtype(name)


def _grid_type(node: onnx.NodeProto, wiring: Wiring) -> int:
    """Integer type of a quantizer: that of its zero point, uint8 without one."""
    return wiring.dtype(node.input[2]) if len(node.input) > 2 else int(TensorProto.UINT8)


def _bias(
    node: onnx.NodeProto, read: onnx.NodeProto, decode: onnx.NodeProto, wiring: Wiring
) -> Iterator[str]:
    bias = wiring.producer(node.input[2]) if len(node.input) > 2 else None
    if bias is None or bias.op_type != "DequantizeLinear":
        return
    arrays = [wiring.array(n.input[1]) for n in (bias, read, decode)]
    if arrays[0] is None or arrays[1] is None or arrays[2] is None:
        return
    off = float(np.abs(arrays[0] / (arrays[1] * arrays[2]) - 1).max())
    if off > BIAS_TOLERANCE:
        yield (
            f"the scale of its bias differs by {off:.0%} from that of input times weights; "
            f"more than {BIAS_TOLERANCE:.0%} is not fused"
        )


def _gemm(node: onnx.NodeProto, decode: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    scale = wiring.array(decode.input[1])
    if scale is not None and scale.size > 1 and len(decode.input) < 3:
        yield "a Gemm with a scale per channel needs its weight zero points written out"
    if any(a.name == "beta" and a.f != 1 for a in node.attribute):
        yield "a Gemm with beta other than 1"


def _output(node: onnx.NodeProto, wiring: Wiring) -> Iterator[str]:
    """What stands between a convolution and the QuantizeLinear that its kernel needs."""
    out = node.output[0]
    clamp: onnx.NodeProto | None = None
    while True:
        readers = wiring.readers.get(out, [])
        if out in wiring.outputs or not readers:
            yield "its output leaves the network in float: the kernel writes integers"
            return
        if len(readers) > 1:
            yield f"its output is read by {len(readers)} nodes, not by one QuantizeLinear"
            return
        if readers[0].op_type not in ("Relu", "Clip") or clamp is not None:
            break
        clamp, out = readers[0], readers[0].output[0]
    quantize = readers[0]
    if quantize.op_type != "QuantizeLinear":
        behind = "" if clamp is None else f" behind a {clamp.op_type}"
        yield f"its output{behind} is not quantized: {quantize.op_type} reads it in float"
        return
    if clamp is not None:
        yield from _clamp(clamp, quantize, _grid_type(quantize, wiring), wiring)


def _clamp(
    clamp: onnx.NodeProto, quantize: onnx.NodeProto, kind: int, wiring: Wiring
) -> Iterator[str]:
    """A Relu or Clip is absorbed where the saturation of the integers does the same."""
    scale = wiring.array(quantize.input[1])
    zero = wiring.array(quantize.input[2]) if len(quantize.input) > 2 else np.zeros(())
    if scale is None or zero is None:
        return
    least, most = (-128, 127) if kind == TensorProto.INT8 else (0, 255)
    low, high = ((bound - zero) * scale for bound in (least, most))
    if clamp.op_type == "Relu":
        if float(low.min()) < 0:
            yield (
                f"a Relu before a QuantizeLinear of zero point {zero:.0f}: it is absorbed only at "
                f"{least}, where saturation does the same"
            )
        return
    bounds = [wiring.array(i) for i in clamp.input[1:3]]
    if all(b is not None for b in bounds) and len(bounds) == 2:
        given = [float(b) for b in bounds if b is not None]
        slack = 1e-3 * float(scale.min())
        if float(low) < given[0] - slack or float(high) > given[1] + slack:
            yield (
                f"a Clip to {given[0]:g}..{given[1]:g} before a range of "
                f"{float(low):.4g}..{float(high):.4g}: it is absorbed only where saturation "
                "does the same"
            )


def saturating(weights: Mapping[str, onnx.TensorProto], cpu: Target) -> tuple[str, ...]:
    """A warning if integer layers have weights that a CPU's kernels cannot add exactly.

    Args:
        weights: stored weights of the layers that run as integers, by layer.
        cpu: what they are to run on.
    """
    names, exact = [], cpu.narrowed(weight_spec(8))
    for name, weight in weights.items():
        if cpu.saturates and weight.data_type == TensorProto.INT8:
            values = numpy_helper.to_array(weight)
            if values.size and (values.min() < exact.qmin or values.max() > exact.qmax):
                names.append(name)
    if not names:
        return ()
    listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return (
        f"{len(names)} layers ({listed}) have weights beyond 7 bits: on {cpu.name} "
        f"their sums can saturate. Quantize with `target: {cpu.name}` in the policy.",
    )
