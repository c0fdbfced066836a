"""Why layers do not run as integers: the certificate's reasons, each once, with a remedy."""

from __future__ import annotations

from collections.abc import Iterator

from mpq.diagnose.facts import Facts, Json
from mpq.diagnose.finding import Finding

LARGE = 0.01
"""Part of all multiply-accumulates from which on a float layer is worth a word."""
REMEDIES = {
    "kept in float by the policy": "give it widths in policy.yaml, then mpq ptq --force",
    "no 16-bit integer kernel": "8 bits in policy.yaml, or mpq analyze --bits 8,4 --force",
    "only 8-bit weights have a kernel": "mpq export --int4-format cast --force",
    "stored for other runtimes": "mpq export --int4-format cast --force",
    "the input is not quantized to": "8-bit activations for it in policy.yaml",
    "its input is not quantized": (
        "mpq ptq --dynamic, if it is a linear layer; else put an operation that runs on integers "
        "(add, mul, concat, pooling, ReLU, sigmoid) where the one before it is"
    ),
    "its output is not quantized": (
        "put an operation that runs on integers (add, mul, concat, pooling, ReLU, sigmoid) where "
        "the one after it is, or swap the two"
    ),
    "its output leaves the network in float": "nothing: what the network answers is float",
    "its weights are": "mpq ptq and mpq export: this file is of a float network",
    "transposed convolution": "one without groups, or without both stride and dilation",
    "a product of two activations": "nothing: attention stays in float",
    "recurrent": "nothing: recurrent layers stay in float",
    "the scale of its bias": "mpq ptq and mpq export, which write it as the kernel asks",
    "is absorbed only": "mpq ptq and mpq export, which begin ranges where the Relu cuts",
}
"""What of a reason is told by which remedy; the first that is in it holds."""
OTHER = "mpq certify FILE, and mpq targets for what has an integer kernel"


def find(facts: Facts) -> Iterator[Finding]:
    """One finding for each reason, the one of most multiply-accumulates first."""
    certificate = facts.certificate
    if certificate is None:
        return
    layers, besides = certificate["layers"], certificate.get("besides", ())
    rows = [*(row for row in layers if not row["integer"]), *besides]
    macs = sum(row["macs"] for row in (*layers, *besides)) or 1
    reasons: dict[str, list[Json]] = {}
    for row in rows:
        if row["macs"]:
            reasons.setdefault(row["reason"], []).append(row)
    parts = {reason: sum(r["macs"] for r in found) / macs for reason, found in reasons.items()}
    for reason in sorted(reasons, key=lambda one: -parts[one]):
        if parts[reason] >= LARGE:
            yield _finding(facts, reason, reasons[reason], parts[reason])


def _finding(facts: Facts, reason: str, rows: list[Json], part: float) -> Finding:
    asked = sorted({row["asked"] for row in rows if row.get("asked", "-") != "-"})
    executed = sorted({row["executed"] for row in rows if row.get("executed")})
    count = "1 layer" if len(rows) == 1 else f"{len(rows)} layers"
    evidence = f"{count} with {part:.1%} of the MACs"
    evidence += f", asked for {', '.join(asked)}" if asked else ""
    evidence += f", executed as {', '.join(executed)}" if executed else ""
    remedy = next((mend for words, mend in REMEDIES.items() if words in reason), OTHER)
    names = tuple(row["name"] for row in rows)
    cause = f"float where integers were to be: {reason}"
    return Finding("integers", names, cause, evidence, remedy, _faster(facts, names))


def _faster(facts: Facts, names: tuple[str, ...]) -> str:
    """What the profile says that these layers would take as integers."""
    known = {} if facts.profile is None else facts.profile["layers"]
    if not all(name in known for name in names):
        return ""
    now, then = (sum(known[name][key] for name in names) for key in ("float_ms", "integer_ms"))
    return f"these layers {now:.3f} to {then:.3f} ms as integers, by profile.json"
