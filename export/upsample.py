"""Transposed convolutions as integers: the quantizer moves up to the convolution.

The graph has Conv -> moves (interleave, crop) -> Relu -> QuantizeLinear, see `mpq.quant.subpixel`;
the runtime fuses Conv -> Relu -> QuantizeLinear. What works on each value by itself may as well
work before the moves, which then run on uint8. Of these, runtimes have DepthToSpace from 1.23 on
(1.20 has it for floats only); for older ones it is written as Reshape, Transpose, Reshape.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRule

from .edit import SITE, only_reader, weight_decoding

INTERLEAVES = frozenset({"DepthToSpace", "Reshape", "Transpose", "Slice"})
"""What the interleaving and cropping of `mpq.quant.subpixel` is exported to."""
ELEMENTWISE = frozenset({"Relu", "Clip", "QuantizeLinear"})


def lift_quantizers(graph: ir.Graph) -> int:
    """Move what follows the interleaving of an integer convolution before it; return how many."""
    count = 0
    for conv in list(graph):
        if conv.op_type != "Conv" or weight_decoding(conv) is None:
            continue
        head, chain = conv.outputs[0], _interleaving(conv.outputs[0])
        while chain and (reader := only_reader(chain[-1].outputs[0])) is not None:
            if reader.op_type not in ELEMENTWISE:
                break
            _lift(graph, head, chain, reader)
            head = reader.outputs[0]
            count += 1
    return count


def _interleaving(value: ir.Value) -> list[ir.Node]:
    chain: list[ir.Node] = []
    while (reader := only_reader(value)) is not None and reader.op_type in INTERLEAVES:
        chain.append(reader)
        value = reader.outputs[0]
    return chain


def _lift(graph: ir.Graph, head: ir.Value, chain: list[ir.Node], reader: ir.Node) -> None:
    out, last = reader.outputs[0], chain[-1].outputs[0]
    for user, index in list(out.uses()):
        user.replace_input_with(index, last)
    reader.replace_input_with(0, head)
    chain[0].replace_input_with(0, out)
    graph.remove(reader)
    graph.insert_before(chain[0], reader)
    out.shape = head.shape
    for move in chain:
        move.outputs[0].type = out.type
    if SITE in reader.metadata_props:  # its integers are those after the interleaving
        chain[-1].metadata_props[SITE] = reader.metadata_props.pop(SITE)


def _shuffle(op: Any, x: Any) -> Any:
    return op.DepthToSpace(x, _outputs=["y"])


def _is_of_integers(context: Any, x: ir.Value, y: ir.Value) -> MatchResult:
    result, node = MatchResult(), y.producer()
    if x.dtype != ir.DataType.UINT8:
        return result.fail("it moves floats, which every runtime can")
    if x.shape is None:
        return result.fail("the shape of its input is not known")
    if node is None or node.attributes.get_string("mode", "DCR") != "CRD":
        return result.fail("it takes the channels of a block apart in another order")
    return result


def _reshapes(op: Any, x: ir.Value, y: ir.Value) -> Any:
    node = y.producer()
    assert node is not None
    assert x.shape is not None
    size = node.attributes["blocksize"].as_int()
    channels, *sizes = x.shape.dims[1:]
    assert isinstance(channels, int)
    first = [0, channels // size**2]

    def shape(name: str, head: list[int], times: int) -> Any:
        def held(part: str, numbers: list[int]) -> Any:
            return op.initializer(ir.tensor(np.array(numbers, np.int64)), f"{y.name}.{name}{part}")

        known = [d * times for d in sizes if isinstance(d, int)]
        if len(known) == len(sizes):
            return held("", [*head, *known])
        free = op.Mul(op.Shape(x, start=2), held(".times", [times]))
        return op.Concat(held("", head), free, axis=0)

    apart = op.Reshape(x, shape("apart", [*first, size, size], 1))
    turned = op.Transpose(apart, perm=[0, 1, 4, 2, 5, 3])
    return op.Reshape(turned, shape("joined", first, size))


PLAIN_SHUFFLE = RewriteRule(_shuffle, _reshapes, _is_of_integers, name="PlainShuffle")
"""DepthToSpace of integers in operations that old runtimes have for them."""
