"""From the widths of layers to the entries of a policy file. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mpq.fields import Spec
from mpq.layers import LayerChoice, Widths
from mpq.policy import LayerPolicy, Policy
from mpq.spec import activation_spec, weight_spec


def formats(widths: Widths) -> tuple[Spec, Spec]:
    """The formats of a layer's weights and input at these widths; of None, float."""
    weight, activation = widths
    return (
        "float" if weight is None else weight_spec(weight),
        "float" if activation is None else activation_spec(activation),
    )


def locked(base: Policy, names: Iterable[str]) -> dict[str, LayerChoice]:
    """What a policy locks, by layer."""
    choices = base.choices(list(names)).values()
    return {choice.name: choice for choice in choices if choice.locked}


def entries(
    widths: Mapping[str, Widths], base: Policy, reasons: Mapping[str, str]
) -> list[LayerPolicy]:
    """One entry for each layer that differs from the default of `base`, or that it locks.

    Args:
        widths: of every layer of the network.
        base: the policy that locked entries and the default formats come from.
        reasons: by layer, where there are any.
    """
    default, held, found = base.default, locked(base, widths), []
    for name, asked in widths.items():
        weight, act = formats(asked)
        reason = reasons.get(name, "")
        if name in held:
            weight, act = held[name].weight or "float", held[name].activation or "float"
            reason = held[name].reason or "locked"
        if name in held or (weight, act) != (default.weight, default.activation):
            found.append(
                LayerPolicy(
                    name=name,
                    weight=None if weight == default.weight else weight,
                    activation=None if act == default.activation else act,
                    locked=True if name in held else None,
                    reason=reason,
                )
            )
    return found
