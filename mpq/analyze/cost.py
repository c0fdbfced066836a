"""What a configuration costs: bits, bytes, BitOps and activation memory. Free of torch.

`widths` maps each layer to (weight bits, activation bits); None is float.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from mpq.layers import FloatPart, LayerInfo, LiveSet, Widths, mean_bits
from mpq.layers import bitops as bitops_of
from mpq.layers import weight_bytes as weight_bytes_of
from mpq.target import Target

SCALE_BYTES = 4
BIAS_BYTES = 4


@dataclass(frozen=True, slots=True)
class Allocation:
    """A solved configuration.

    Args:
        widths: (weight bits, activation bits) of each layer, None for float.
        objective: predicted increase of the loss: the sum of the chosen scores.
        effective_bits: mean width of the weights.
        bitops: MACs x weight bits x activation bits, per image.
        weight_bytes: bytes of the weights alone.
        bytes: predicted bytes of the exported file.
        activation_bytes: peak of the activations alive at one time (`activation_bytes`); None
            where the scores do not know the network's tensors.
        latency_ms: as the latency profile predicts it; None without one.
        status: `optimal`, as proved by the solver, or `best found` where it ran out of time.
        gap: relative distance to the proved bound.
    """

    widths: dict[str, Widths]
    objective: float
    effective_bits: float
    bitops: float
    weight_bytes: int
    bytes: int
    activation_bytes: int | None = None
    latency_ms: float | None = None
    status: str = "optimal"
    gap: float = 0.0

    def to_json(self) -> dict[str, object]:
        """An entry of `front` in `sensitivity.json`."""
        return {
            "widths": {name: list(pair) for name, pair in self.widths.items()},
            "effective_bits": self.effective_bits,
            "bytes": self.bytes,
            "bitops": self.bitops,
            "activation_bytes": self.activation_bytes,
            "latency_ms": self.latency_ms,
            "predicted_drop": self.objective,
        }


def effective_bits(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> float:
    """Mean width of the weights, `sum n_l b_l / sum n_l`; float counts 32."""
    return mean_bits((layer.params, widths[layer.name][0]) for layer in layers)


def bitops(
    layers: Iterable[LayerInfo], widths: Mapping[str, Widths], besides: Iterable[FloatPart] = ()
) -> float:
    """BitOps per image: `sum MACs x weight bits x activation bits`, of layers and of the rest."""
    fixed = sum(bitops_of(part.macs, None, None) for part in besides)
    return fixed + sum(layer.bitops(*widths[layer.name]) for layer in layers)


def weight_bytes(layers: Iterable[LayerInfo], widths: Mapping[str, Widths]) -> int:
    """Bytes of the weights alone."""
    return sum(layer.weight_bytes(widths[layer.name][0]) for layer in layers)


def layer_bytes(layer: LayerInfo, bits: int | None, target: Target) -> int:
    """Bytes of one layer in the file: weights, scales, bias, name, and its share of the graph."""
    per_channel = (0 if bits is None else SCALE_BYTES) + (BIAS_BYTES if layer.bias else 0)
    channels = layer.out_channels * per_channel
    weights = weight_bytes_of(_stored_weights(layer, bits), bits)
    names = len(layer.name) * (1 if bits == 8 else 2)  # another width is an entry of the policy
    return weights + channels + names + target.bytes_per_layer.get(bits, 0)


def _stored_weights(layer: LayerInfo, bits: int | None) -> int:
    """Weights in the file: those of an integer stem have zeros among them (export/stem.py)."""
    if bits is None or bits > 8 or layer.kind != "conv" or len(layer.weight_shape) != 4:
        return layer.params
    out, channels, *kernel = layer.weight_shape
    pixels = layer.in_elements * out / (layer.out_elements * channels)  # for each output pixel
    if layer.grouped or channels > 4 or not 3 <= pixels <= 6:
        return layer.params
    blocks = [(k + (k - 1) // 2 % 2 + 1) // 2 for k in kernel]
    return 4 * out * channels * blocks[0] * blocks[1]


def fixed_bytes(besides: Iterable[FloatPart], target: Target, bits: Iterable[int | None]) -> int:
    """Bytes of the exported file that belong to no layer, where weights have widths of `bits`."""
    shared = sum(target.bytes_per_width.get(width, 0) for width in set(bits))
    return target.bytes_per_file + shared + sum(part.bytes for part in besides)


def predicted_bytes(
    layers: Collection[LayerInfo],
    widths: Mapping[str, Widths],
    target: Target,
    besides: Iterable[FloatPart] = (),
) -> int:
    """Bytes of the exported file (`tests/test_size.py` compares them with real files)."""
    own = sum(layer_bytes(layer, widths[layer.name][0], target) for layer in layers)
    return own + fixed_bytes(besides, target, (widths[layer.name][0] for layer in layers))


def activation_bytes(live_sets: Iterable[LiveSet], widths: Mapping[str, Widths]) -> int:
    """Peak of the activations alive at one time for one image, each packed at its width.

    A tensor has the activation width of the layers that read it, 8 bits where only additions and
    the like do, 32 where it stays in float. This is what a device needs that packs activations;
    onnxruntime's CPU kernels hold a byte for each value of 8 bits or fewer.
    """
    bits = {name: pair[1] for name, pair in widths.items()}
    return (max((m.bits(bits) for m in live_sets), default=0) + 7) // 8
