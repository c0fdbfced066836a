"""What a runtime stores and computes: `Target`, and the one function that answers from it.

Search, latency, annotation, lowering, certificate and reasons ask `Target.support`. The targets
themselves are in `mpq.targets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from mpq.errors import PolicyError
from mpq.layers import LayerChoice, LayerInfo, LayerKind, Operation, Widths
from mpq.spec import (
    DYNAMIC,
    ROUNDED_16,
    WIDTHS,
    QuantSpec,
    activation_spec,
    weight_spec,
)

Arithmetic = Literal["x86", "arm64", "wasm"]
"""The kinds of CPU whose kernels the integer reference knows."""


@dataclass(frozen=True, slots=True)
class Support:
    """What a target makes of a layer.

    Args:
        stored: format of its weights in the file, None for float.
        integer: whether an integer kernel runs it.
        reason: why not.
    """

    stored: QuantSpec | None
    integer: bool
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Gap:
    """Layers that have no integer kernel at any width, and why; None stands for either."""

    kind: LayerKind
    reason: str
    grouped: bool | None = None
    strided: bool | None = None
    dilated: bool | None = None

    def covers(self, operation: Operation) -> bool:
        """Whether a layer of this operation is among them."""
        facts = ("grouped", "strided", "dilated")
        asked = ((getattr(self, fact), getattr(operation, fact)) for fact in facts)
        return self.kind == operation.kind and all(ask in (None, is_so) for ask, is_so in asked)


MOVING_OPS = frozenset({"maxpool", "flatten", "transpose", "split", "slice", "pad"})
"""Operations that move or select values and run on integers unchanged, on any target."""
GAPS = (
    Gap(
        "conv_transpose",
        "a transposed convolution in groups has no integer form (docs/speed.md)",
        grouped=True,
    ),
    Gap(
        "conv_transpose",
        "no integer kernel for a transposed convolution with both stride and dilation",
        strided=True,
        dilated=True,
    ),
)
"""What mpq computes on integers nowhere (`mpq.quant.operation`)."""


@dataclass(frozen=True, slots=True)
class Target:
    """A runtime as data; `support` is the one answer to how a layer is stored and run on it.

    Args:
        name: as in a policy's `target`.
        integer_ops: graph operations besides layers that have an integer kernel.
        moving_ops: operations that move or select values and run on integers unchanged.
        integer_bits: widest operands of its integer kernels; narrower weights are widened at load.
        widths: that it stores.
        gaps: layers without an integer kernel.
        dynamic: kinds with a kernel that takes the range of its input at run time.
        writes_floats: kinds whose integer kernel may write floats; that of others writes integers.
        bytes_per_layer: average bytes of a layer's own nodes, constants and policy entry in the
            file, by its width (None: float), besides weights, scales and bias.
        bytes_per_width: of the nodes that unpack all layers of a width, where it is packed.
        bytes_per_file: what a file has besides its layers.
        saturates: its integer kernels multiply weights of at most 7 bits exactly.
        about: where it runs, in words.
        short: another name for it.
        needs: what it must have installed.
        int4_formats: storage of 4-bit weights (`mpq.export.form`) that is worth writing for it.
        arithmetic: whose kernels the integer reference computes; None: its own, which are unknown.
        members: the targets that it stands for, by name, if it is several.
    """

    name: str
    integer_ops: frozenset[str]
    moving_ops: frozenset[str] = MOVING_OPS
    integer_bits: int = 8
    widths: tuple[int, ...] = WIDTHS
    gaps: tuple[Gap, ...] = GAPS
    dynamic: frozenset[LayerKind] = frozenset()
    writes_floats: frozenset[LayerKind] = frozenset()
    bytes_per_layer: Mapping[int | None, int] = field(default_factory=dict)
    bytes_per_width: Mapping[int | None, int] = field(default_factory=dict)
    bytes_per_file: int = 0
    saturates: bool = False
    about: str = ""
    short: str = ""
    needs: str = "onnxruntime 1.18, for INT4 1.23"
    int4_formats: frozenset[str] = frozenset({"cast", "unpack", "dq"})
    arithmetic: Arithmetic | None = "x86"
    members: tuple[str, ...] = ()

    def support(self, choice: LayerChoice, operation: Operation | None = None) -> Support:
        """How a layer is stored and whether it runs as integers.

        Args:
            choice: the formats that are asked for.
            operation: what the layer computes; None: one without any gap.

        Raises:
            PolicyError: a width that the target does not store, or a format that no kernel reads.
        """
        self._check(choice, operation)
        if choice.weight is None:
            return Support(None, False, "kept in float by the policy")
        reason = self._why_float(choice.weight.bits, choice.activation_bits, operation)
        stored = choice.weight if reason else self.narrowed(choice.weight)
        return Support(stored, not reason, reason)

    def runs_integers(self, layer: LayerInfo, weight: int | None, activation: int | None) -> bool:
        """Whether a layer runs as integers at these widths (None: float).

        Raises:
            PolicyError: as `support`.
        """
        return self.support(LayerChoice.at(layer.name, weight, activation), layer.operation).integer

    def integers(
        self, layers: Iterable[LayerInfo], widths: Mapping[str, Widths]
    ) -> dict[str, bool]:
        """Which layers of a configuration run as integers, by name. Raises as `support`."""
        return {layer.name: self.runs_integers(layer, *widths[layer.name]) for layer in layers}

    def take(self, choice: LayerChoice) -> LayerChoice:
        """The choice with the weights that the target stores for it, and the reason.

        Raises:
            PolicyError: as `support`.
        """
        stored = self.support(choice).stored
        if stored == choice.weight:
            return choice
        reason = f"{choice.reason}; {SATURATION}" if choice.reason else SATURATION
        return replace(choice, weight=stored, reason=reason)

    def narrowed(self, weight: QuantSpec) -> QuantSpec:
        """The weight format of an integer layer where a policy asks for this one."""
        return replace(weight, reduced=True) if self.saturates and weight.bits == 8 else weight

    def _why_float(self, weight: int, activation: int | None, operation: Operation | None) -> str:
        widest = self.integer_bits
        if weight > widest:
            return (
                f"no {weight}-bit integer kernel: the stored integers are expanded to float at load"
            )
        if activation is None or activation > widest:
            known = f"{widest} bits or fewer"
            return f"the input is not quantized to {known}, so no integer kernel applies"
        if operation is not None and operation.constant:
            return "it reads no input of the network: the runtime computes it once, at load"
        gaps = (gap for gap in self.gaps if operation is not None and gap.covers(operation))
        return next((gap.reason for gap in gaps), "")

    def _check(self, choice: LayerChoice, operation: Operation | None) -> None:
        """Refuse a width that is not stored, and what no kernel reads."""
        weight, act = choice.weight, choice.activation
        if any(spec is not None and spec.bits not in self.widths for spec in (weight, act)):
            raise PolicyError(
                f"target {self.name} has no {choice.asked} layer. It has those of "
                f"{', '.join(map(str, self.widths))} bits and float."
            )
        if weight and not weight.signed:
            raise PolicyError(
                f"weight of layer {choice.name} must be signed, e.g. {weight_spec(weight.bits)}. "
                f"Got {weight} instead."
            )
        other = {spec.bits: spec for spec in (DYNAMIC, ROUNDED_16)}
        if act and act not in (activation_spec(act.bits), other.get(act.bits)):
            also = f", or {other[act.bits]}" if act.bits in other else ""
            raise PolicyError(
                f"activation of layer {choice.name} must be {activation_spec(act.bits)} at "
                f"{act.bits} bits{also}. Got {act} instead."
            )
        if operation is not None and choice.dynamic and operation.kind not in self.dynamic:
            raise PolicyError(
                f"activation of layer {choice.name} must be {activation_spec(8)}: only "
                f"{', '.join(sorted(self.dynamic)) or 'other'} layers have a kernel for {DYNAMIC}, "
                f"and this is a {operation.kind}."
            )


SATURATION = "8-bit weights take 7 bits: without VNNI two products would saturate in 16 bits"
ROUNDED = "its input is rounded to {} bits when it runs"
"""What else is to say of a 16-bit layer in the form `exact`."""
WIDER = "reads a tensor that another layer needs at {} bits"
"""What else is to say of a layer that shares the grid of its input with one of more bits."""
