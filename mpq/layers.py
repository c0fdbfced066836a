"""`LayerInfo`: all that search, policies and reports know of a layer. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

LayerKind = Literal["conv", "depthwise", "conv_transpose", "linear"]


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
        """Bytes of the weights alone at a width (None: float32), rounded up to whole bytes."""
        return (self.params * (bits or 32) + 7) // 8

    def bitops(self, weight_bits: int | None, activation_bits: int | None) -> float:
        """BitOps per image: MACs x weight bits x activation bits (HAWQ-V3; None counts 32)."""
        return float(self.macs) * (weight_bits or 32) * (activation_bits or 32)
