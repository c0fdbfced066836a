"""Transposed convolutions as integers: the quantizer moves up to the convolution.

The graph has Conv -> moves (interleave, crop) -> Relu -> QuantizeLinear, see `mpq.quant.subpixel`;
the runtime fuses Conv -> Relu -> QuantizeLinear. What works on each value by itself may as well
work before the moves, which then run on uint8. Of these, runtimes have DepthToSpace from 1.23 on
(1.20 has it for floats only); for older ones it is written as Reshape, Transpose, Reshape.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

MOVES = frozenset({"DepthToSpace", "Reshape", "Transpose", "Slice"})
ELEMENTWISE = frozenset({"Relu", "Clip", "QuantizeLinear"})


def lift_quantizers(graph: ir.Graph) -> int:
    """Move what follows the moves behind an integer convolution before them; return how many."""
    count = 0
    for conv in list(graph):
        if conv.op_type != "Conv" or not _integer_weights(conv):
            continue
        head, chain = conv.outputs[0], _moves_behind(conv.outputs[0])
        while chain and (reader := _only_reader(chain[-1].outputs[0])) is not None:
            if reader.op_type not in ELEMENTWISE:
                break
            _lift(graph, head, chain, reader)
            head = reader.outputs[0]
            count += 1
    return count


def plain_shuffles(graph: ir.Graph) -> int:
    """Write each DepthToSpace of integers in operations that old runtimes have for them."""
    count = 0
    for node in list(graph):
        x = node.inputs[0] if node.op_type == "DepthToSpace" else None
        if x is None or x.dtype != ir.DataType.UINT8 or x.shape is None:
            continue
        _, channels, height, width = (d if isinstance(d, int) else -1 for d in x.shape)
        size = node.attributes["blocksize"].as_int()
        outputs = channels // size**2
        apart = [0, outputs, size, size, height, width]
        joined = [0, outputs, height * size, width * size]
        first = ir.node("Reshape", [x, _constant(graph, apart)])
        turned = ir.node("Transpose", first.outputs, attributes={"perm": [0, 1, 4, 2, 5, 3]})
        last = ir.node("Reshape", [turned.outputs[0], _constant(graph, joined)], name=node.name)
        graph.insert_before(node, [first, turned, last])
        last.outputs[0].shape, last.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        ir.convenience.replace_all_uses_with(node.outputs[0], last.outputs[0])
        graph.remove(node, safe=True)
        count += 1
    return count


def _constant(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    value = ir.val(f"shuffle.{len(graph.initializers)}")
    value.const_value = ir.tensor(np.array(numbers, np.int64))
    graph.register_initializer(value)
    return value


def _integer_weights(conv: ir.Node) -> bool:
    weight = conv.inputs[1]
    decode = None if weight is None else weight.producer()
    return decode is not None and decode.op_type == "DequantizeLinear"


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    alone = len(uses) == 1 and uses[0][1] == 0 and not value.is_graph_output()
    return uses[0][0] if alone else None


def _moves_behind(value: ir.Value) -> list[ir.Node]:
    chain: list[ir.Node] = []
    while (reader := _only_reader(value)) is not None and reader.op_type in MOVES:
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
    if reader.name:  # a site: its integers are those behind the moves
        chain[-1].name, reader.name = reader.name, None
