"""Storage forms of weights: what lies in the file is one thing, what runs another.

A narrow integer type and a Cast to INT8, or packed bytes and bit operations: the runtime folds both
at load, so that the layer is an INT8 layer when it runs (`form.py`). 8- and 16-bit weights are
stored as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .edit import Writer, stored_weights
from .form import Form
from .unpack import unpack

TOGETHER = 2**24
"""Weights that are unpacked together at most, so that they fold: in between they take 4 bytes."""


def pack(model: ir.Model, bits: Mapping[str, int], form: Form) -> int:
    """Give each layer's weights their storage form.

    Args:
        model: a placed model, weights as INT8 or INT16 initializers.
        bits: weight width of each layer by module path.
        form: which forms the file may use.

    Returns:
        The number of weights that changed form.
    """
    weights, packed = dict(stored_weights(model.graph)), defaultdict[int, list[ir.Value]](list)
    narrow = [(weights[path], n) for path, n in bits.items() if n < 8 and path in weights]
    for weight, width in narrow:
        if width == 4 and form.int4 == "dq" and not _multiplied(weight):
            _standard_form(model.graph, weight)
        elif (width == 4 and form.int4 == "cast") or (width == 2 and form.int2):
            stored = _stored(model.graph, f"{weight.name}.int{width}", _integers(weight), width)
            decoded = Writer(model.graph, model.graph[0]).node("Cast", stored, to=ir.DataType.INT8)
            _replace(model.graph, weight, decoded)
        else:
            packed[width].append(weight)
    for width, all_of in packed.items():
        together = sum(_integers(weight).size for weight in all_of) <= TOGETHER
        for group in [all_of] if together else [[weight] for weight in all_of]:
            write, arrays = Writer(model.graph, model.graph[0]), map(_integers, group)
            for weight, value in zip(group, unpack(write, [*arrays], width), strict=True):
                _replace(model.graph, weight, value)
    return len(narrow)


def _integers(weight: ir.Value) -> NDArray[np.int8]:
    assert weight.const_value is not None
    return weight.const_value.numpy().astype(np.int8)


def _replace(graph: ir.Graph, weight: ir.Value, decoded: ir.Value) -> None:
    for user, index in list(weight.uses()):
        user.replace_input_with(index, decoded)
    del graph.initializers[str(weight.name)]


def _multiplied(weight: ir.Value) -> bool:
    """Whether the integers themselves are worked on: MatMulInteger and Pad have no 4-bit form."""
    users = [user for user, _ in weight.uses()]
    readers = [n for user in users for n, _ in user.outputs[0].uses()]
    rearranged = any(n.op_type not in ("DequantizeLinear", "Transpose", "Cast") for n in users)
    return rearranged or any(n.op_type == "MatMulInteger" for n in readers)


def _standard_form(graph: ir.Graph, weight: ir.Value) -> None:
    """INT4 straight into DequantizeLinear: nothing between, and no zero point of another type."""
    array = _integers(weight)
    for user, _ in list(weight.uses()):
        if user.op_type == "Transpose":
            turned = np.ascontiguousarray(array.T)
            stored = _stored(graph, f"{weight.name}.turned", turned, 4)
            ir.convenience.replace_all_uses_with(user.outputs[0], stored)
            graph.remove(user, safe=True)
        else:
            stored = _stored(graph, f"{weight.name}.int4", array, 4)
            user.replace_input_with(0, stored)
        for decode, _ in stored.uses():
            decode.resize_inputs(2)
    del graph.initializers[str(weight.name)]


def _stored(graph: ir.Graph, name: str, array: NDArray[np.int8], bits: int) -> ir.Value:
    """An initializer of a 4- or 2-bit type."""
    if name in graph.initializers:
        return graph.initializers[name]
    narrow = array.astype(ml_dtypes.int4 if bits == 4 else ml_dtypes.int2)
    stored = ir.val(name, const_value=ir.tensor(narrow))
    graph.register_initializer(stored)
    return stored
