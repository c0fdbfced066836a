"""Storage forms of weights: what lies in the file is one thing, what runs another.

`cast`: 4-bit weights are an INT4 initializer and a Cast to INT8 that the runtime folds at load, so
that the layer is an INT8 layer when it runs (onnxruntime 1.23 or newer). `unpack`: weights of 2, 3,
5 or 6 bits are packed bytes and bit operations that fold at load likewise. 8- and 16-bit weights
are stored as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .unpack import Unpacker


def pack(model: ir.Model, bits: Mapping[str, int]) -> int:
    """Give each layer's weights their storage form.

    Args:
        model: a placed model, weights as INT8 or INT16 initializers named `<path>.weight`.
        bits: weight width of each layer by module path.

    Returns:
        The number of weights that changed form.
    """
    count = 0
    for path, width in bits.items():
        if width >= 8:
            continue
        for name in weight_names(path):
            value = model.graph.initializers.get(name)
            if value is not None:
                _replace(model.graph, value, width)
                count += 1
    return count


def weight_names(path: str) -> tuple[str, str]:
    """Initializer names that a layer's weights may have: its own, or that of an island's layer."""
    return f"{path}.weight", f"{path}.layer.weight"


def _replace(graph: ir.Graph, weight: ir.Value, bits: int) -> None:
    assert weight.const_value is not None
    array = weight.const_value.numpy().astype(np.int8)
    uses = list(weight.uses())
    users = {user for user, _ in uses}
    first = next(n for n in graph if n in users)
    if bits == 4:
        decoded = _cast_form(graph, first, f"{weight.name}.int4", array)
    else:
        decoded = Unpacker(graph, first, str(weight.name)).weight(array, bits)
    for user, index in uses:
        user.replace_input_with(index, decoded)
    del graph.initializers[str(weight.name)]


def _cast_form(graph: ir.Graph, anchor: ir.Node, name: str, array: NDArray[np.int8]) -> ir.Value:
    stored = ir.val(name, const_value=ir.tensor(array.astype(ml_dtypes.int4)))
    graph.register_initializer(stored)
    cast = ir.node("Cast", [stored], attributes={"to": ir.DataType.INT8})
    graph.insert_before(anchor, cast)
    return cast.outputs[0]
