"""From an allocation to a policy file: entries, evidence, and a reason for every decision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mpq.analyze.cost import Allocation
from mpq.analyze.sensitivity import PARTS, Sensitivity
from mpq.entries import entries, formats, locked
from mpq.layers import LayerInfo, Widths
from mpq.policy import Constraints, DataInfo, LayerPolicy, ModelInfo, Policy, SearchResult
from mpq.targets import get_target

TOP = 3
"""How many layers a reason ranks by name of place."""


@dataclass(frozen=True, slots=True)
class _Trade:
    """What the weights of a layer trade, between the narrowest and the widest width scored."""

    loss: float
    bytes: int

    @property
    def per_byte(self) -> float:
        return self.loss / max(self.bytes, 1)


def locked_widths(policy: Policy, layers: Mapping[str, LayerInfo]) -> dict[str, Widths]:
    """Widths of the layers that a policy locks, for `Search`.

    Raises:
        PolicyError: the policy does not fit the layers.
    """
    choices = policy.resolve(list(layers)).values()
    return {c.name: (c.weight_bits, c.activation_bits) for c in choices if c.locked}


def build_policy(
    allocation: Allocation,
    sensitivity: Sensitivity,
    *,
    model: ModelInfo | None = None,
    data: DataInfo | None = None,
    constraints: Constraints | None = None,
    target: str | None = None,
    base: Policy | None = None,
    measured_drop: float | None = None,
) -> Policy:
    """A policy with one entry for each layer that differs from the default or is locked.

    Args:
        allocation: the configuration.
        sensitivity: what it was solved from; the evidence.
        model: which network.
        data: which images.
        constraints: the budgets, for the record.
        target: name of the target; None: that of this computer.
        base: the policy that locked entries and the default formats come from.
        measured_drop: top-1 lost on validation images, where that was measured.
    """
    base = base or Policy()
    held = locked(base, allocation.widths)
    kept = {name: choice.reason or "locked" for name, choice in held.items()}
    reasons = {**reasons_for(allocation, sensitivity), **kept}
    return Policy(
        model=model,
        data=data or DataInfo(),
        target=get_target(target).name,
        default=base.default,
        groups=sensitivity.groups,
        layers=tuple(entries(allocation.widths, base, reasons)),
        constraints=constraints or Constraints(),
        result=_result(allocation, measured_drop),
        evidence={
            layer.name: _evidence(layer, sensitivity, reasons[layer.name])
            for layer in sensitivity.layers
        },
    )


def reasons_for(allocation: Allocation, sensitivity: Sensitivity) -> dict[str, str]:
    """One line per layer: why its weights have their width."""
    trades = {layer.name: _trade(layer, sensitivity) for layer in sensitivity.layers}
    order = sorted(trades, key=lambda n: trades[n].per_byte, reverse=True)
    loss = sum(t.loss for t in trades.values()) or 1.0
    params = sum(layer.params for layer in sensitivity.layers)
    narrow, wide = min(sensitivity.bits("weight")), max(sensitivity.bits("weight"))
    reasons = {}
    for layer in sensitivity.layers:
        trade, place = trades[layer.name], order.index(layer.name)
        share = f"{_percent(layer.params / params)} of the weights"
        at_stake = f"{_percent(trade.loss / loss)} of the loss at {narrow} bits"
        bits = allocation.widths[layer.name][0]
        if bits is None or narrow == wide:
            text = share
        elif bits == narrow:
            text = f"{share}, {at_stake}"
        elif place < TOP:
            text = f"{_ORDINALS[place]} loss per byte saved: {at_stake}, {share}"
        else:
            text = f"kept: {at_stake}, {share}"
        reasons[layer.name] = text + _input_reason(layer.name, allocation, sensitivity)
    return reasons


def _input_reason(name: str, allocation: Allocation, sensitivity: Sensitivity) -> str:
    """Why the input of a layer has its width; empty where there was no choice."""
    scored = [b for b in sensitivity.bits("activation") if b < 16]
    bits = allocation.widths[name][1]
    if len(scored) < 2 or bits is None or bits > max(scored):
        return ""
    narrow = min(scored)
    total = sum(sensitivity.score(i.name, "activation", narrow) for i in sensitivity.layers)
    share = sensitivity.score(name, "activation", narrow) / (total or 1.0)
    kept = "kept at" if bits > narrow else "at"
    return f"; input {kept} {bits} bits: {_percent(share)} of the inputs' loss at {narrow}"


_ORDINALS = ("most", "second most", "third most")


def _trade(layer: LayerInfo, sensitivity: Sensitivity) -> _Trade:
    widths = sensitivity.bits("weight")
    wide, narrow = max(widths), min(widths)
    scores = [sensitivity.score(layer.name, "weight", b) for b in (narrow, wide)]
    saved = layer.weight_bytes(wide) - layer.weight_bytes(narrow)
    return _Trade(max(scores[0] - scores[1], 0.0), saved)


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}" if share >= 0.001 else "< 0.1%"


def allocation_policy(widths: Mapping[str, Widths]) -> Policy:
    """The bare policy of a configuration, to prepare a graph with."""
    found = []
    for name, asked in widths.items():
        weight, activation = formats(asked)
        found.append(LayerPolicy(name=name, weight=weight, activation=activation))
    return Policy().with_layers(*found)


def _result(allocation: Allocation, measured_drop: float | None) -> SearchResult:
    return SearchResult(
        effective_bits=round(allocation.effective_bits, 4),
        weight_bytes=allocation.weight_bytes,
        predicted_bytes=allocation.bytes,
        bitops=allocation.bitops,
        activation_bytes=allocation.activation_bytes,
        latency_ms=None if allocation.latency_ms is None else _short(allocation.latency_ms),
        predicted_drop=_short(allocation.objective),
        measured_drop=None if measured_drop is None else round(measured_drop, 3),
        solver="highs",
        status=allocation.status,
        gap=allocation.gap,
    )


def _evidence(layer: LayerInfo, sensitivity: Sensitivity, reason: str) -> dict[str, Any]:
    scores = {
        part: {
            str(bits): _short(sensitivity.score(layer.name, part, bits))
            for bits in sensitivity.bits(part)
        }
        for part in PARTS
    }
    return {
        "score": scores["weight"],
        "activation": scores["activation"],
        "params": layer.params,
        "macs": layer.macs,
        "reason": reason,
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
