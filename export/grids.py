"""On what grid a layer of a file reads its input, and whether that is the one that was asked for.

The grid is read from the file alone: back from the layer through what only moves values, to the
Clip or the QuantizeLinear that made the integers. Layers that read one tensor share its grid, which
has the widest of the widths that their policy asks for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from mpq.layers import LayerChoice

from .operators import MOVES
from .reasons import Wiring

_THROUGH = (*MOVES, "Identity", "SpaceToDepth", "DequantizeLinear")
_WIDTHS = {TensorProto.UINT4: 4, TensorProto.INT4: 4, TensorProto.UINT2: 2, TensorProto.INT2: 2,
           TensorProto.UINT16: 16, TensorProto.INT16: 16}  # fmt: skip


@dataclass(frozen=True, slots=True)
class InputGrid:
    """The grid that a layer's input lies on.

    Args:
        tensor: name of the integers in the file; of layers that share a grid the same.
        bits: that its integers take; 0 where the input lies on no grid that is known.
        dynamic: whether its range is found at run time.
    """

    tensor: str = ""
    bits: int = 0
    dynamic: bool = False

    def contradiction(self, choice: LayerChoice, asked: int) -> str:
        """How this is not what was asked of an integer layer, or an empty string.

        Args:
            choice: for the layer.
            asked: bits of the grid, the widest of all that read it.
        """
        if choice.dynamic != self.dynamic:
            found = "at run time" if self.dynamic else "as a constant"
            return f"the file has the range of its input {found}"
        if self.bits == asked:
            return ""
        found = f"on {self.bits} bits" if self.bits else "on no known grid"
        return f"the file rounds its input {found} in place of {asked}"


UNKNOWN = InputGrid()


def grid_of(node: onnx.NodeProto, wiring: Wiring) -> InputGrid:
    """The grid of a matrix node's first input."""
    return _grid(node.input[0], wiring)


def _grid(name: str, wiring: Wiring) -> InputGrid:
    """The grid of a tensor; that of all parts of what is put together, as circular padding is."""
    before = wiring.producer(name, _THROUGH)
    if before is None:
        return UNKNOWN
    name = before.output[0]
    if before.op_type == "Concat":
        parts = {_grid(part, wiring) for part in before.input}
        return parts.pop() if len(parts) == 1 else UNKNOWN
    if before.op_type == "DynamicQuantizeLinear":
        return InputGrid(name, 8, dynamic=True)
    if before.op_type == "QuantizeLinear":
        zero = before.input[2] if len(before.input) > 2 else ""
        return InputGrid(name, _WIDTHS.get(wiring.dtype(zero), 8))
    bounds = [wiring.array(i) for i in before.input[1:3]] if before.op_type == "Clip" else []
    if len(bounds) == 2 and bounds[0] is not None and bounds[1] is not None:
        return InputGrid(name, int(bounds[1] - bounds[0]).bit_length())
    return UNKNOWN


def asked_of_grids(readers: Iterable[tuple[InputGrid, LayerChoice]]) -> dict[str, int]:
    """The widest width that integer layers ask of each tensor that they read, by its name."""
    widest: dict[str, int] = {}
    for grid, choice in readers:
        widest[grid.tensor] = max(widest.get(grid.tensor, 0), choice.activation_bits or 0)
    return widest
