"""Hard-sigmoid as an integer addition, because the runtime has no integer kernel for it.

`hardsigmoid(x) = clip((x + 3) / 6, 0, 1)`. On an output grid of zero point 0 and scale at most
1/255, saturation is the clip, and `rint(hardsigmoid(x) / s) = rint((x + 3) / (6 s))` clipped to
0..255: an Add of the constant 3 whose quantizer has the scale `6 s`, read back with the scale `s`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

ALPHA, BETA = 1 / 6, 0.5
_SLACK = 1 + 1e-5
"""By how much a float32 `1/255` may exceed 1/255."""


def _quantized(op: Any, x: Any, scale: Any, zero: Any) -> Any:
    return op.QuantizeLinear(op.HardSigmoid(x, _outputs=["gate"]), scale, zero, _outputs=["y"])


def _saturates(
    context: Any, x: ir.Value, scale: ir.Value, zero: ir.Value, gate: ir.Value, y: ir.Value
) -> MatchResult:
    result, node, before = MatchResult(), gate.producer(), x.producer()
    assert node is not None
    given = (node.attributes.get_float("alpha", 0.2), node.attributes.get_float("beta", 0.5))
    if not np.allclose(given, (ALPHA, BETA), atol=1e-6):
        return result.fail(f"alpha and beta must be 1/6 and 1/2. Got {given[0]:g}, {given[1]:g}")
    if before is None or before.op_type != "DequantizeLinear":
        return result.fail("its input is not quantized")
    if scale.const_value is None or zero.const_value is None or scale.const_value.size != 1:
        return result.fail("the output has no constant scale and zero point")
    if int(zero.const_value.numpy()) != 0:
        return result.fail("the output has a zero point")
    if np.float32(scale.const_value.numpy()) * 255 > _SLACK:
        return result.fail("the output saturates above 1")
    return result


def _addition(
    op: Any, x: ir.Value, scale: ir.Value, zero: ir.Value, gate: ir.Value, y: ir.Value
) -> Any:
    def constant(name: str, array: np.generic) -> Any:
        return op.initializer(ir.tensor(np.asarray(array)), f"{y.name}.{name}")

    assert scale.const_value is not None
    most, step = constant("most", np.uint8(255)), np.float32(scale.const_value.numpy())
    three = op.DequantizeLinear(most, constant("three", np.float32(3 / 255)), zero)
    return op.QuantizeLinear(op.Add(x, three), constant("sixfold", np.float32(6 * step)), zero)


HARD_SIGMOID = RewriteRule(_quantized, _addition, _saturates, name="HardSigmoidToAdd")
