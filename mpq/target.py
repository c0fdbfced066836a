"""What a runtime stores and computes, as data: one table, read by search, annotation and export.

The facts of `onnxruntime-cpu` are measured (docs/runtime.md): integer Conv and Gemm exist for 8-bit
operands only, so narrower weights are stored packed and run at 8 bits, and 16-bit layers are stored
in 16 bits and run in float.

`onnxruntime-cpu-avx2` is the same on an x86 CPU without VNNI instructions. There the kernel adds
two products u8 x s8 in 16 bits, saturating: `2 * 255 * 127` does not fit, `2 * 255 * 64` does, so
8-bit weights take 7 bits of their type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mpq.cpu import this_cpu
from mpq.errors import PolicyError, nearest
from mpq.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Support:
    """How a layer of one width is stored and run; `reason` says why not as integers."""

    storage: str
    compute: str
    integer: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime as data.

    Args:
        name: as in a policy's `target`.
        layers: weight and activation bits to support; `None` is float.
        integer_ops: graph operations besides layers that have an integer kernel.
        moving_ops: operations that move or select values and run on integers unchanged.
        bytes_per_layer: average bytes of a layer's graph nodes, constants and policy entry in the
            file, by weight width (None: float).
        bytes_per_file: what a file has besides its layers.
        saturates: its integer kernels multiply weights of at most 7 bits exactly.
    """

    name: str
    layers: dict[tuple[int | None, int | None], Support]
    integer_ops: frozenset[str]
    moving_ops: frozenset[str]
    bytes_per_layer: Mapping[int | None, int] = field(default_factory=dict)
    bytes_per_file: int = 0
    saturates: bool = False

    def narrowed(self, weight: QuantSpec) -> QuantSpec:
        """The weight format that is used where a policy asks for this one."""
        return replace(weight, reduced=True) if self.saturates and weight.bits == 8 else weight

    def support(self, weight_bits: int | None, activation_bits: int | None) -> Support:
        """Support of a layer at these widths (None: float).

        Raises:
            PolicyError: the target cannot store such a layer.
        """
        try:
            return self.layers[weight_bits, activation_bits]
        except KeyError:
            known = ", ".join(f"W{w or 32}A{a or 32}" for w, a in self.layers)
            raise PolicyError(
                f"target {self.name} has no W{weight_bits or 32}A{activation_bits or 32} layer. "
                f"It has {known}."
            ) from None

    def layer_bytes(self, weight_bits: int | None) -> int:
        """Bytes of a layer of that width in the file, besides weights, scales and bias."""
        return self.bytes_per_layer.get(weight_bits, 0)


_FLOAT_16 = "no 16-bit integer kernel: the stored integers are expanded to float at load"
_FLOAT_IN = "the input is not quantized to 8 bits or fewer, so no integer kernel applies"
_FLOAT = "kept in float by the policy"
ROUNDED = "its input is rounded to {} bits when it runs"
"""What else is to say of a 16-bit layer in the form `exact`."""


def _onnxruntime_layers() -> dict[tuple[int | None, int | None], Support]:
    table: dict[tuple[int | None, int | None], Support] = {}
    for w in (2, 3, 4, 5, 6, 8):
        stored = f"int{w}"
        for a in (2, 3, 4, 5, 6, 8):
            table[w, a] = Support(stored, "int8", True)
        for wide in (16, None):
            table[w, wide] = Support(stored, "float", False, _FLOAT_IN)
    for narrow in (2, 3, 4, 5, 6, 8, 16, None):
        table[16, narrow] = Support("int16", "float", False, _FLOAT_16)
        table[None, narrow] = Support("float", "float", False, _FLOAT)
    return table


BYTES_PER_LAYER = {16: 258, 8: 320, 6: 985, 5: 1295, 4: 390, 3: 1450, 2: 765, None: 200}
"""Packed widths pay for the nodes that unpack them; all but 8 bits for an entry in the policy."""
BYTES_PER_FILE = 1200

ONNXRUNTIME_CPU = Target(
    name="onnxruntime-cpu",
    layers=_onnxruntime_layers(),
    integer_ops=frozenset(
        {"add", "mul", "concat", "avgpool", "global_avgpool", "sigmoid", "hardsigmoid"}
    ),
    moving_ops=frozenset({"maxpool", "flatten", "transpose", "split", "slice", "pad"}),
    bytes_per_layer=BYTES_PER_LAYER,
    bytes_per_file=BYTES_PER_FILE,
)

ONNXRUNTIME_AVX2 = replace(ONNXRUNTIME_CPU, name="onnxruntime-cpu-avx2", saturates=True)

TARGETS = {target.name: target for target in (ONNXRUNTIME_CPU, ONNXRUNTIME_AVX2)}
SATURATION = "8-bit weights take 7 bits: without VNNI two products would saturate in 16 bits"


def this_target() -> Target:
    """The target that this computer is."""
    return ONNXRUNTIME_AVX2 if this_cpu().saturates else ONNXRUNTIME_CPU


def get_target(name: str | None) -> Target:
    """The target of that name; None: that of this computer.

    Raises:
        PolicyError: an unknown name.
    """
    if name is None:
        return this_target()
    if name not in TARGETS:
        raise PolicyError(
            f"target must be one of {', '.join(TARGETS)}. Got {name!r}{nearest(name, TARGETS)}"
        )
    return TARGETS[name]
