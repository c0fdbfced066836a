"""`LayerInfo` and `Moment`: all that search, policies and reports know of a network. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["conv", "depthwise", "conv_transpose", "linear"]
Widths = tuple[int | None, int | None]
"""Weight bits and activation bits of a layer; None is float."""


def weight_bytes(params: int, bits: int | None) -> int:
    """Bytes of so many weights packed at a width (None: float32), rounded up to whole bytes."""
    return (params * (bits or 32) + 7) // 8


def bitops(macs: int, weight_bits: int | None, activation_bits: int | None) -> float:
    """BitOps: MACs x weight bits x activation bits (HAWQ-V3; None counts 32)."""
    return float(macs) * (weight_bits or 32) * (activation_bits or 32)


def mean_bits(weights: Iterable[tuple[int, int | None]]) -> float:
    """Mean width of (number, bits) of weights, `sum n b / sum n`; float counts 32."""
    weights = list(weights)
    return sum(n * (bits or 32) for n, bits in weights) / sum(n for n, _ in weights)


@dataclass(frozen=True, slots=True)
class LayerInfo:
    """One quantizable layer.

    Args:
        name: module path, the key of the policy.
        kind: operation; grouped convolutions count as `conv`.
        weight_shape: shape of the weight tensor.
        out_channels: number of output channels, hence of weight scales.
        bias: whether there is one after batch-norm folding.
        macs: multiply-accumulates per image.
        in_elements: elements of the input per image.
        out_elements: elements of the output per image.
    """

    name: str
    kind: LayerKind
    weight_shape: tuple[int, ...]
    out_channels: int
    bias: bool
    macs: int
    in_elements: int
    out_elements: int

    @property
    def params(self) -> int:
        """Number of weights, without the bias."""
        count = 1
        for n in self.weight_shape:
            count *= n
        return count

    def weight_bytes(self, bits: int | None) -> int:
        """Bytes of the weights alone at a width, as the function of that name."""
        return weight_bytes(self.params, bits)

    def bitops(self, weight_bits: int | None, activation_bits: int | None) -> float:
        """BitOps per image, as the function of that name."""
        return bitops(self.macs, weight_bits, activation_bits)


@dataclass(frozen=True, slots=True)
class Moment:
    """Activations that are alive at one time while one image passes.

    Args:
        fixed: bits of those whose width no policy decides.
        layers: (layer, elements) of those that a layer reads, hence at its activation width.
    """

    fixed: int
    layers: tuple[tuple[str, int], ...]

    def bits(self, activation_bits: Mapping[str, int | None]) -> int:
        """Bits alive at the given activation widths (None: float32)."""
        return self.fixed + sum(n * (activation_bits[name] or 32) for name, n in self.layers)

    def within(self, other: Moment) -> bool:
        """Whether another moment holds at least as much at any widths."""
        more = dict(other.layers)
        return self.fixed <= other.fixed and all(n <= more.get(k, 0) for k, n in self.layers)
