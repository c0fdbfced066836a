"""What a configuration costs: bits, bytes and BitOps, from `LayerInfo` alone. Free of torch.

`widths` maps each layer to (weight bits, activation bits); None is float.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpq.layers import LayerInfo
from mpq.target import Target

Widths = tuple[int | None, int | None]
SCALE_BYTES = 4
BIAS_BYTES = 4


def effective_bits(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> float:
    """Mean width of the weights, `sum n_l b_l / sum n_l`; float counts 32."""
    layers = list(layers)
    total = sum(layer.params for layer in layers)
    return sum(layer.params * (widths[layer.name][0] or 32) for layer in layers) / total


def bitops(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> float:
    """BitOps per image: `sum MACs x weight bits x activation bits`."""
    return sum(layer.bitops(*widths[layer.name]) for layer in layers)


def weight_bytes(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> int:
    """Bytes of the weights alone."""
    return sum(layer.weight_bytes(widths[layer.name][0]) for layer in layers)


def layer_bytes(layer: LayerInfo, bits: int | None, target: Target) -> int:
    """Bytes of one layer in the file: weights, scales, bias, and its share of the graph."""
    per_channel = (0 if bits is None else SCALE_BYTES) + (BIAS_BYTES if layer.bias else 0)
    channels = layer.out_channels * per_channel
    return layer.weight_bytes(bits) + channels + target.bytes_per_layer


def predicted_bytes(
    layers: Iterable[LayerInfo], widths: Mapping[str, Widths], target: Target
) -> int:
    """Bytes of the exported file."""
    return sum(layer_bytes(layer, widths[layer.name][0], target) for layer in layers)
