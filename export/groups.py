"""Grouped convolutions in fewer, wider groups: an exact rewrite.

The integer kernel runs a grouped convolution group by group: it gathers the windows of a group and
multiplies them, 16 output channels at a time. With a few channels a group, as in RegNet and
ResNeXt, gathering is nearly all of the time. Neighbouring groups become one whose weights are
block-diagonal: the zeros change no sum. The file holds the weights as they were; the blocks are
spread by operations that fold at load. A depthwise convolution has a kernel of its own and stays.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from .edit import Writer, own_weight

GATHER = 40.0
"""Nanoseconds to gather one window of one group, whatever its size (docs/speed.md)."""
MACS = 200.0
"""Multiply-accumulates a nanosecond."""
LANES = 16
"""Output channels that the kernel computes at a time."""


def merge_groups(graph: ir.Graph) -> int:
    """Rewrite each grouped convolution for which wider groups are faster; return how many."""
    count = 0
    for conv in list(graph):
        weight = _grouped_weight(conv)
        if weight is None or weight.shape is None:
            continue
        shape = [int(d) for d in weight.shape if isinstance(d, int)]
        groups = conv.attributes["group"].as_int()
        merge = best_merge(groups, shape[0] // groups, math.prod(shape[1:]))
        if merge > 1:
            _spread(graph, weight, shape, groups, merge)
            conv.attributes["group"] = ir.AttrInt64("group", groups // merge)
            count += 1
    return count


def best_merge(groups: int, outputs: int, terms: int) -> int:
    """How many groups to make one.

    Args:
        groups: of the convolution.
        outputs: output channels of a group.
        terms: products in a sum: input channels of a group times kernel positions.
    """

    def cost(merge: int) -> float:
        lanes = math.ceil(merge * outputs / LANES) * LANES
        return groups / merge * (GATHER + merge * terms * lanes / MACS)

    return min((m for m in range(1, groups + 1) if groups % m == 0), key=cost)


def _grouped_weight(conv: ir.Node) -> ir.Value | None:
    """The integer initializer of a grouped convolution with a spatial kernel, if it is its own."""
    groups = conv.attributes.get_int("group", 1) if conv.op_type == "Conv" else 1
    weight = own_weight(conv) if groups > 1 else None
    if weight is None:
        return None
    shape = [d for d in weight.shape or () if isinstance(d, int)]
    depthwise = shape[1] == 1 and shape[0] == groups
    return None if depthwise or math.prod(shape[2:]) == 1 else weight


def _spread(graph: ir.Graph, weight: ir.Value, shape: list[int], groups: int, merge: int) -> None:
    """`[O, I, *K]` -> `[O, merge I, *K]`, zero where output and input are of different groups."""
    user, index = next(iter(weight.uses()))
    write = Writer(graph, user)
    narrow = [groups // merge, merge, shape[0] // groups, 1, math.prod(shape[1:])]
    wide = [shape[0], merge * shape[1], *shape[2:]]
    mask = -np.eye(merge, dtype=np.int8).reshape(1, merge, 1, merge, 1)  # -1 has every bit
    blocks = write.node("Reshape", weight, write.constant(np.array(narrow, np.int64)))
    masked = write.node("BitwiseAnd", blocks, write.constant(mask))
    spread = write.node("Reshape", masked, write.constant(np.array(wide, np.int64)))
    user.replace_input_with(index, spread)
