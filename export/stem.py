"""The stem on 2x2 blocks of pixels: an exact rewrite of a strided first convolution.

The integer kernel gathers the window of every output pixel row by row. With 3 channels a row is a
few bytes, so gathering costs more than multiplying. SpaceToDepth turns each 2x2 block of pixels
into one pixel of 12 channels; a `k` x `k` window of stride 2 becomes one of half the size and
stride 1, its rows four times as long (the rewrite of the MLPerf ResNet-50 entries for TPUs, C. Ying
et al., "Image Classification at Supercomputer Scale", 2018). The weights are spread over the blocks
and the rest is zeros: every sum has the same terms as before, so every output bit is the same.

SpaceToDepth stands before the QuantizeLinear, on floats: old runtimes have it for floats only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from .edit import own_weight

MAX_CHANNELS = 4
"""Images. From 16 channels on, rows are long enough as they are."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One spatial axis of the convolution: before (`kernel`, padding) and on blocks.

    Args:
        lead: zeros put before the kernel, so that it begins on a block.
        kernel: blocks that it covers.
        front: blocks of padding before the image.
        end: blocks of padding after it.
    """

    lead: int
    kernel: int
    front: int
    end: int

    @classmethod
    def of(cls, size: int, kernel: int, front: int, end: int) -> Axis | None:
        """The axis on blocks of 2 for a stride of 2; None where blocks do not fit the image."""
        if size % 2:
            return None
        outputs = (size + front + end - kernel) // 2 + 1
        lead = front % 2
        blocks, padding = (kernel + lead + 1) // 2, (front + lead) // 2
        rest = outputs - 1 + blocks - padding - size // 2
        return cls(lead, blocks, padding, rest) if rest >= 0 else None


def block_stem(graph: ir.Graph) -> int:
    """Rewrite each convolution of stride 2 that reads a quantized image; return how many."""
    count = 0
    for conv in list(graph):
        found = _match(conv)
        if found is not None:
            _rewrite(graph, conv, *found)
            count += 1
    return count


def spread(weight: NDArray[Any], rows: Axis, columns: Axis) -> NDArray[Any]:
    """Weights `[O, C, k, k]` over blocks, `[O, 4 C, k', k']`, channels in SpaceToDepth's order."""
    out, channels, height, width = weight.shape
    shape = (out, channels, 2 * rows.kernel, 2 * columns.kernel)
    wide = np.zeros(shape, weight.dtype)
    wide[:, :, rows.lead : rows.lead + height, columns.lead : columns.lead + width] = weight
    blocks = wide.reshape(out, channels, rows.kernel, 2, columns.kernel, 2)
    order = blocks.transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(order.reshape(out, 4 * channels, rows.kernel, columns.kernel))


def _match(conv: ir.Node) -> tuple[ir.Node, ir.Value, Axis, Axis] | None:
    """The QuantizeLinear of the image, the weights, and both axes."""
    if conv.op_type != "Conv" or tuple(conv.attributes.get_ints("strides", ())) != (2, 2):
        return None
    quantize, weight = _image_quantizer(conv.inputs[0]), own_weight(conv)
    if quantize is None or weight is None or not _plain(conv):
        return None
    image, kernel = _sizes(quantize.inputs[0]), _sizes(weight)
    if len(image) != 4 or len(kernel) != 4 or image[1] > MAX_CHANNELS:
        return None
    top, left, bottom, right = conv.attributes.get_ints("pads", (0, 0, 0, 0))
    rows = Axis.of(image[2], kernel[2], top, bottom)
    columns = Axis.of(image[3], kernel[3], left, right)
    if rows is None or columns is None:
        return None
    return quantize, weight, rows, columns


def _rewrite(
    graph: ir.Graph, conv: ir.Node, quantize: ir.Node, weight: ir.Value, rows: Axis, columns: Axis
) -> None:
    blocks = ir.node("SpaceToDepth", [quantize.inputs[0]], attributes={"blocksize": 2})
    graph.insert_before(quantize, blocks)
    quantize.replace_input_with(0, blocks.outputs[0])
    assert weight.const_value is not None
    wide = spread(weight.const_value.numpy(), rows, columns)
    weight.const_value, weight.shape = ir.tensor(wide), ir.Shape(wide.shape)
    for node in (quantize, *(n for n, _ in quantize.outputs[0].uses())):
        node.outputs[0].shape = None
    conv.attributes["strides"] = ir.AttrInt64s("strides", [1, 1])
    pads = [rows.front, columns.front, rows.end, columns.end]
    conv.attributes["pads"] = ir.AttrInt64s("pads", pads)
    conv.attributes.pop("kernel_shape", None)


def _sizes(value: ir.Value | None) -> list[int]:
    """The shape of a value whose sizes are known, but for the first; else nothing."""
    shape = [] if value is None or value.shape is None else list(value.shape)
    known = [d if isinstance(d, int) else -1 for d in shape]
    return known if all(d > 0 for d in known[1:]) else []


def _plain(conv: ir.Node) -> bool:
    """Neither grouped nor dilated, with its padding in numbers."""
    given = conv.attributes
    close = set(given.get_ints("dilations", (1, 1))) == {1}
    return (
        given.get_int("group", 1) == 1
        and close
        and given.get_string("auto_pad", "NOTSET") == "NOTSET"
    )


def _image_quantizer(value: ir.Value | None) -> ir.Node | None:
    """The QuantizeLinear before a convolution's input, if all between belongs to it alone."""
    path = ("DequantizeLinear", "Clip", "QuantizeLinear")
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in path or len(value.uses()) != 1:
            return None
        if node.op_type == "QuantizeLinear":
            return node
        value = node.inputs[0]
    return None


def blocked(graph: onnx.GraphProto) -> set[str]:
    """Values that hold the pixels of an image in 2x2 blocks."""
    found: set[str] = set()
    for node in graph.node:  # in the order of execution
        after = node.op_type in ("QuantizeLinear", "Clip") and node.input[0] in found
        if node.op_type == "SpaceToDepth" or after:
            found.update(node.output)
    return found


def plain(blocks: NDArray[Any]) -> NDArray[Any]:
    """`[N, 4 C, H, W]` of such a value as the pixels `[N, C, 2 H, 2 W]` that it holds."""
    n, c, h, w = blocks.shape
    pixels = blocks.reshape(n, 2, 2, c // 4, h, w).transpose(0, 3, 4, 1, 5, 2)
    return pixels.reshape(n, c // 4, 2 * h, 2 * w)
