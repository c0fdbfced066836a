"""What a configuration costs: bits, bytes, BitOps and activation memory. Free of torch.

`widths` maps each layer to (weight bits, activation bits); None is float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpq.layers import LayerInfo, Moment, Widths, mean_bits
from mpq.target import Target

SCALE_BYTES = 4
BIAS_BYTES = 4


def effective_bits(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> float:
    """Mean width of the weights, `sum n_l b_l / sum n_l`; float counts 32."""
    return mean_bits((layer.params, widths[layer.name][0]) for layer in layers)


def bitops(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> float:
    """BitOps per image: `sum MACs x weight bits x activation bits`."""
    return sum(layer.bitops(*widths[layer.name]) for layer in layers)


def weight_bytes(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> int:
    """Bytes of the weights alone."""
    return sum(layer.weight_bytes(widths[layer.name][0]) for layer in layers)


def layer_bytes(layer: LayerInfo, bits: int | None, target: Target) -> int:
    """Bytes of one layer in the file: weights, scales, bias, name, and its share of the graph."""
    per_channel = (0 if bits is None else SCALE_BYTES) + (BIAS_BYTES if layer.bias else 0)
    channels = layer.out_channels * per_channel
    return layer.weight_bytes(bits) + channels + len(layer.name) + target.layer_bytes(bits)


def predicted_bytes(
    layers: Iterable[LayerInfo], widths: Mapping[str, Widths], target: Target
) -> int:
    """Bytes of the exported file (`tests/test_size.py` compares them with real files)."""
    own = sum(layer_bytes(layer, widths[layer.name][0], target) for layer in layers)
    return target.bytes_per_file + own


def activation_bytes(moments: Iterable[Moment], widths: Mapping[str, Widths]) -> int:
    """Peak of the activations alive at one time for one image, each packed at its width.

    A tensor has the activation width of the layers that read it, 8 bits where only additions and
    the like do, 32 where it stays in float. This is what a device needs that packs activations;
    onnxruntime's CPU kernels hold a byte for each value of 8 bits or fewer.
    """
    bits = {name: pair[1] for name, pair in widths.items()}
    return (max((m.bits(bits) for m in moments), default=0) + 7) // 8
