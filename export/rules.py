"""Local rewrites that every file gets, as rules of onnxscript: pattern, condition, replacement.

Each condition says why its rule does not apply (`mpq.export.edit.refusals`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from .edit import integers

ARGUMENTS = ("starts", "ends", "axes", "steps")


def _mean(op: Any, x: Any, axes: Any) -> Any:
    return op.ReduceMean(x, axes, _outputs=["mean"])


def _is_over_space(context: Any, x: ir.Value, axes: ir.Value, mean: ir.Value) -> MatchResult:
    result, found, node = MatchResult(), integers(axes), mean.producer()
    if x.shape is None or len(x.shape) != 4:
        return result.fail("the input does not have 4 dimensions")
    if found is None or sorted(a % 4 for a in found) != [2, 3]:
        return result.fail(f"the mean must be over axes 2 and 3. Got {found}")
    if node is not None and node.attributes.get_int("keepdims", 1) != 1:
        return result.fail("the mean drops its axes")
    return result


def _pool(op: Any, x: ir.Value, **_: Any) -> Any:
    return op.GlobalAveragePool(x)


def _slices(op: Any, x: Any) -> Any:
    inner = op.Slice(x, _allow_other_inputs=True, _outputs=["inner"])
    return op.Slice(inner, _allow_other_inputs=True, _outputs=["outer"])


def _cut_different_axes(context: Any, x: ir.Value, inner: ir.Value, outer: ir.Value) -> MatchResult:
    result, first, second = MatchResult(), _arguments(inner), _arguments(outer)
    if first is None or second is None:
        return result.fail("starts, ends and axes must be constant, and axes not negative")
    if both := set(first[2]) & set(second[2]):
        return result.fail(f"both cut axis {min(both)}")
    return result


def _join(op: Any, x: ir.Value, inner: ir.Value, outer: ir.Value) -> Any:
    pairs = zip(ARGUMENTS, _arguments(inner) or (), _arguments(outer) or (), strict=True)
    joined = [
        op.initializer(ir.tensor(np.array([*a, *b], np.int64)), f"{outer.name}.{name}")
        for name, a, b in pairs
    ]
    return op.Slice(x, *joined)


def _arguments(cut: ir.Value) -> list[list[int]] | None:
    """Starts, ends, axes (from the front) and steps of a Slice, if all are written out."""
    node = cut.producer()
    found = [] if node is None else [integers(value) for value in node.inputs[1:]]
    if len(found) == 3 and found[0] is not None:
        found.append([1] * len(found[0]))
    known = [ints for ints in found if ints is not None]
    return known if len(known) == 4 and min(known[2]) >= 0 else None


def _decoding(op: Any, weight: Any, scale: Any) -> Any:
    return op.DequantizeLinear(weight, scale, _outputs=["decoded"])


def _is_of_a_gemm(
    context: Any, weight: ir.Value, scale: ir.Value, decoded: ir.Value
) -> MatchResult:
    result = MatchResult()
    if not any(node.op_type == "Gemm" and index == 1 for node, index in decoded.uses()):
        return result.fail("it does not decode the weights of a Gemm")
    return result if scale.const_value is not None else result.fail("its scale is not constant")


def _with_zero_points(op: Any, weight: ir.Value, scale: ir.Value, decoded: ir.Value) -> Any:
    node = decoded.producer()
    assert node is not None
    assert scale.const_value is not None
    zeros = np.zeros_like(scale.const_value.numpy(), np.int8)
    zero = op.initializer(ir.tensor(zeros), f"{decoded.name}.zero")
    return op.DequantizeLinear(weight, scale, zero, axis=node.attributes.get_int("axis", 1))


GLOBAL_POOL = RewriteRule(_mean, _pool, _is_over_space, name="GlobalPool")
"""A mean over space becomes GlobalAveragePool: it has an integer kernel, ReduceMean has none."""
JOIN_SLICES = RewriteRule(_slices, _join, _cut_different_axes, name="JoinSlices")
"""Slices along one axis after another become one."""
GEMM_ZERO_POINTS = RewriteRule(_decoding, _with_zero_points, _is_of_a_gemm, name="GemmZeroPoints")
"""A per-channel Gemm gets its weight zero points written out, which old runtimes need to run it
and new ones to fuse it."""
