"""What search, policies, targets and reports know of a network and ask of its layers. No torch.

`Operation` is what decides about kernels, `LayerInfo` a layer with its sizes, `LayerChoice` the
decision for it, `LiveSet` the activations alive at one time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mpq.spec import DYNAMIC, ROUNDED_16, QuantSpec, activation_spec, weight_spec

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
class Operation:
    """What a layer computes, as far as a kernel for it depends on that.

    Args:
        kind: as of `LayerInfo`.
        grouped: whether channels are apart in groups.
        strided: whether it steps by more than one anywhere.
        dilated: whether its kernel's positions are further apart than one anywhere.
        constant: whether it reads no input of the network, so that a runtime computes it at load.
    """

    kind: LayerKind
    grouped: bool = False
    strided: bool = False
    dilated: bool = False
    constant: bool = False


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
        grouped: as of `Operation`, like the following.
        strided: see there.
        dilated: see there.
        constant: see there.
    """

    name: str
    kind: LayerKind
    weight_shape: tuple[int, ...]
    out_channels: int
    bias: bool
    macs: int
    in_elements: int
    out_elements: int
    grouped: bool = False
    strided: bool = False
    dilated: bool = False
    constant: bool = False

    @property
    def operation(self) -> Operation:
        """What it computes, without its sizes."""
        return Operation(self.kind, self.grouped, self.strided, self.dilated, self.constant)

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
class FloatPart:
    """Something besides the layers, which stays in float whatever the policy says.

    Args:
        name: module path, path of a tensor, or node.
        kind: what it is: `LSTM`, `LayerNorm`, `matmul`, `tensor`, `graph`.
        bytes: that it takes in the file.
        macs: multiply-accumulates per image.
        reason: why it stays in float.
    """

    name: str
    kind: str
    bytes: int
    macs: int
    reason: str


@dataclass(frozen=True, slots=True)
class LayerChoice:
    """The resolved decision for one layer; a width of None is float."""

    name: str
    weight: QuantSpec | None
    activation: QuantSpec | None
    locked: bool = False
    reason: str = ""

    @classmethod
    def at(cls, name: str, weight_bits: int | None, activation_bits: int | None) -> LayerChoice:
        """The layer at these widths, in the formats that are usual at them; None is float."""
        return cls(
            name,
            None if weight_bits is None else weight_spec(weight_bits),
            None if activation_bits is None else activation_spec(activation_bits),
        )

    @property
    def weight_bits(self) -> int | None:
        """Width of the weights, None for float."""
        return self.weight.bits if self.weight else None

    @property
    def activation_bits(self) -> int | None:
        """Width of the input activations, None for float."""
        return self.activation.bits if self.activation else None

    @property
    def dynamic(self) -> bool:
        """Whether the range of the input is taken at run time."""
        return self.activation == DYNAMIC

    @property
    def exact(self) -> bool:
        """Whether the input is rounded to 16 bits at run time, for float arithmetic."""
        return self.activation == ROUNDED_16

    @property
    def asked(self) -> str:
        """In short, as certificates have it: `W4A8`, `W8A8 dynamic`, `W16A16 exact`."""
        form = " dynamic" if self.dynamic else " exact" if self.exact else ""
        return f"W{self.weight_bits or 32}A{self.activation_bits or 32}{form}"


@dataclass(frozen=True, slots=True)
class LiveSet:
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

    def within(self, other: LiveSet) -> bool:
        """Whether another set holds at least as much at any widths."""
        more = dict(other.layers)
        return self.fixed <= other.fixed and all(n <= more.get(k, 0) for k, n in self.layers)
