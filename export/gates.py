"""Hard-sigmoid as an integer addition, because the runtime has no integer kernel for it.

`hardsigmoid(x) = clip((x + 3) / 6, 0, 1)`. On an output grid of zero point 0 and scale at most
1/255, saturation is the clip, and `rint(hardsigmoid(x) / s) = rint((x + 3) / (6 s))` clipped to
0..255: an Add of the constant 3 whose quantizer has the scale `6 s`, read back with the scale `s`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

ALPHA, BETA = 1 / 6, 0.5
_SLACK = 1 + 1e-5
"""By how much a float32 `1/255` may exceed 1/255."""


def hard_sigmoids(graph: ir.Graph) -> int:
    """Replace each HardSigmoid between integers; return how many."""
    count = 0
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "HardSigmoid" else None
        if x is None or not _standard(node) or _op_of(x) != "DequantizeLinear":
            continue
        readers = [reader for reader, _ in node.outputs[0].uses()]
        scale = _saturating_scale(readers[0]) if len(readers) == 1 else None
        if scale is None:
            continue
        _replace(graph, node, readers[0], scale)
        count += 1
    return count


def _op_of(value: ir.Value) -> str:
    producer = value.producer()
    return producer.op_type if producer is not None else ""


def _standard(node: ir.Node) -> bool:
    alpha, beta = (node.attributes.get(name) for name in ("alpha", "beta"))
    given = (alpha.as_float() if alpha else 0.2, beta.as_float() if beta else 0.5)
    return bool(np.allclose(given, (ALPHA, BETA), atol=1e-6))


def _saturating_scale(quantize: ir.Node) -> np.float32 | None:
    """Scale of a QuantizeLinear that saturates where a hard-sigmoid does; None for any other."""
    if quantize.op_type != "QuantizeLinear" or len(quantize.inputs) < 3:
        return None
    scale, zero = (v.const_value if v is not None else None for v in quantize.inputs[1:3])
    if scale is None or zero is None or scale.size != 1 or int(zero.numpy()) != 0:
        return None
    step = np.float32(scale.numpy())
    return step if step * 255 <= _SLACK else None


def _replace(graph: ir.Graph, node: ir.Node, quantize: ir.Node, scale: np.float32) -> None:
    def constant(name: str, array: np.generic) -> ir.Value:
        value = ir.val(f"{quantize.name}.{name}", const_value=ir.tensor(np.asarray(array)))
        graph.register_initializer(value)
        return value

    most, zero = constant("most", np.uint8(255)), quantize.inputs[2]
    three = ir.node("DequantizeLinear", [most, constant("three", np.float32(3 / 255)), zero])
    add = ir.node("Add", [node.inputs[0], three.outputs[0]])
    graph.insert_before(node, [three, add])
    quantize.replace_input_with(0, add.outputs[0])
    quantize.replace_input_with(1, constant("sixfold", np.float32(6 * scale)))
    add.outputs[0].shape, add.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph.remove(node, safe=True)
