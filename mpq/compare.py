"""What two policies differ in, layer by layer. Free of torch.

Sizes and scores come from the evidence that `mpq analyze` writes into a policy; where neither file
has any, widths alone are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mpq.errors import PolicyError
from mpq.layers import LayerChoice, Widths, bitops, mean_bits, weight_bytes
from mpq.policy import Policy


@dataclass(frozen=True, slots=True)
class Change:
    """One layer that differs; amounts are of b less those of a, None where nothing is known.

    Args:
        layer: module path.
        a: weight and activation bits in the first policy, None for float.
        b: in the second.
        bytes: of the weights.
        bitops: per image.
        drop: predicted loss.
        reason: what the second policy says of the layer.
    """

    layer: str
    a: Widths
    b: Widths
    bytes: int | None
    bitops: float | None
    drop: float | None
    reason: str


@dataclass(frozen=True)
class Difference:
    """All layers that differ, and the sums over all layers."""

    changes: tuple[Change, ...]
    layers: int
    effective_bits_a: float | None
    effective_bits_b: float | None
    bytes: int | None
    bitops: float | None
    drop: float | None

    def to_json(self) -> dict[str, Any]:
        """As `mpq diff --json` prints it: `changes`, and the sums beside it."""
        return asdict(self)


def compare(a: Policy, b: Policy) -> Difference:
    """Compare two policies of one network.

    Raises:
        PolicyError: they are of different networks, or one does not fit the other's layers.
    """
    _same_network(a, b)
    evidence = {**a.evidence, **b.evidence}
    names = list(evidence) or list(dict.fromkeys(e.name for p in (a, b) for e in p.layers))
    if not names:
        names = ["(every layer)"]
    first, second = a.resolve(names), b.resolve(names)
    known = {n: _facts(n, evidence[n]) for n in evidence}
    changes = tuple(
        _change(first[n], second[n], known.get(n)) for n in names if _differ(first[n], second[n])
    )

    def total(values: list[Any]) -> Any:
        return None if not known or None in values else sum(values)

    return Difference(
        changes=changes,
        layers=len(names),
        effective_bits_a=_effective_bits(first, known),
        effective_bits_b=_effective_bits(second, known),
        bytes=total([c.bytes for c in changes]),
        bitops=total([c.bitops for c in changes]),
        drop=total([c.drop for c in changes]),
    )


def _same_network(a: Policy, b: Policy) -> None:
    if a.model and b.model and a.model.arch != b.model.arch:
        raise PolicyError(
            f"policies must be of one network to be compared. Got {a.model.arch} and "
            f"{b.model.arch}."
        )
    if a.evidence and b.evidence and a.evidence.keys() != b.evidence.keys():
        odd = sorted(a.evidence.keys() ^ b.evidence.keys())
        raise PolicyError(
            "policies must be of one network to be compared, but only one of them knows "
            f"{', '.join(odd[:3])}."
        )


@dataclass(frozen=True, slots=True)
class _Facts:
    """What the evidence of a layer says."""

    params: int
    macs: int
    weight: Mapping[str, float]
    activation: Mapping[str, float]
    reason: str


def _facts(name: str, entry: Any) -> _Facts:
    try:
        return _Facts(
            int(entry["params"]),
            int(entry["macs"]),
            {str(k): float(v) for k, v in entry["score"].items()},
            {str(k): float(v) for k, v in entry.get("activation", {}).items()},
            str(entry.get("reason", "")),
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise PolicyError(
            f"evidence of layer {name} must hold params, macs and score as `mpq analyze` writes "
            "them. Analyze again, or remove the key evidence."
        ) from None


def _differ(a: LayerChoice, b: LayerChoice) -> bool:
    return (a.weight, a.activation) != (b.weight, b.activation)


def _change(a: LayerChoice, b: LayerChoice, known: _Facts | None) -> Change:
    old, new = (a.weight_bits, a.activation_bits), (b.weight_bits, b.activation_bits)
    if known is None:
        return Change(a.name, old, new, None, None, None, b.reason)
    drops = [_score(known, widths) for widths in (old, new)]
    return Change(
        a.name,
        old,
        new,
        bytes=weight_bytes(known.params, new[0]) - weight_bytes(known.params, old[0]),
        bitops=bitops(known.macs, *new) - bitops(known.macs, *old),
        drop=None if drops[0] is None or drops[1] is None else drops[1] - drops[0],
        reason=b.reason or known.reason,
    )


def _score(known: _Facts, widths: Widths) -> float | None:
    """Predicted loss at these widths; None where one was not scored."""
    total = 0.0
    for scores, bits in ((known.weight, widths[0]), (known.activation, widths[1])):
        if bits is None:
            continue
        if str(bits) not in scores:
            return None
        total += scores[str(bits)]
    return total


def _effective_bits(
    choices: Mapping[str, LayerChoice], known: Mapping[str, _Facts]
) -> float | None:
    if not any(facts.params for facts in known.values()):
        return None
    return mean_bits((facts.params, choices[n].weight_bits) for n, facts in known.items())
