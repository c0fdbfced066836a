"""Whether the scores can be trusted for this network: predicted against measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import mean, variance

import numpy as np

from mpq.diagnose.accuracy import FLOOR, lost_points
from mpq.diagnose.facts import Facts, Json
from mpq.diagnose.finding import Finding

TRUSTED = 0.8
"""Spearman's rho from which on scores order configurations well enough to search by; the default
metric has 0.88 to 0.97 on the networks of docs/analysis.md."""
FEWEST = 10
"""Measured configurations below which a rank correlation says little."""
NOTHING = 1e-6
"""Nats of all layers together, at the narrowest widths: the answers do not depend on anything."""


def find(facts: Facts) -> Iterator[Finding]:
    """Scores of nothing, scores without images, scores that order configurations wrongly."""
    if facts.sensitivity is None:
        return
    yield from _constant(facts)
    if facts.sensitivity["metric"] == "sqnr":
        yield _blind(facts)
    if facts.validation is not None:
        yield from _disordered(facts, facts.validation)
    yield from _too_small(facts)


def _constant(facts: Facts) -> Iterator[Finding]:
    highest = max(facts.scores.values(), default=0.0)
    if facts.in_nats and highest < NOTHING:
        yield Finding(
            "scores",
            (),
            "the answers hardly depend on the images: is this network trained?",
            f"the largest score of all layers is {highest:.1e} nats on "
            f"{facts.sensitivity['samples'] if facts.sensitivity else 0} images",
            "check the checkpoint (--weights ema or raw), --normalize, and that --data are images "
            "of the kind that it was trained on",
        )


def _blind(facts: Facts) -> Finding:
    return Finding(
        "scores",
        (),
        "the scores look at the weights alone",
        "metric sqnr, without images: it does not know which layer matters to the answers",
        "mpq analyze with --data; images need no labels",
    )


def _disordered(facts: Facts, validation: Json) -> Iterator[Finding]:
    policies, rho = validation["policies"], validation["rho"]
    costly = max((p["kl"] for p in policies), default=0.0) >= FLOOR
    if rho is None or len(policies) < FEWEST or rho >= TRUSTED or not costly:
        return
    layer, factor, mended = _worst_layer(facts, policies)
    evidence = (
        f"Spearman's rho of predicted and measured divergence is {rho:.2f} over {len(policies)} "
        f"random policies on {validation['images']} images"
    )
    if layer:
        evidence += f"; those with few bits in {layer} cost {factor:.1f} times what is predicted"
    metric = facts.sensitivity["metric"] if facts.sensitivity else ""
    remedy = "mpq analyze --metric kl --rescore --validate 50 --force: each candidate is measured"
    if metric == "kl":
        remedy = "more images (--num-calib), or mpq analyze --max-drop, which measures as it goes"
    gain = f"rho {rho:.2f} to {mended:.2f} with the score of {layer} set right" if layer else ""
    yield Finding(
        "scores", (layer,) if layer else (), "the scores order policies wrongly", evidence, remedy,
        gain,
    )  # fmt: skip


def _worst_layer(facts: Facts, policies: Sequence[Json]) -> tuple[str, float, float]:
    """The layer whose width explains best where predictions fail, by how much, and rho without.

    With `e = log(measured / predicted)` of a policy: the layer whose narrow policies differ most in
    `e` from its wide ones, in units of the standard error.
    """
    errors = [math.log(max(p["kl"], 1e-12) / max(p["predicted"], 1e-12)) for p in policies]
    best, most = "", 2.0
    for name in facts.layers:
        narrow, wide = _split(errors, policies, name)
        if min(len(narrow), len(wide)) < 3:
            continue
        spread = math.sqrt(variance(narrow) / len(narrow) + variance(wide) / len(wide))
        z = abs(mean(narrow) - mean(wide)) / max(spread, 1e-9)
        if z > most:
            best, most = name, z
    if not best:
        return "", 1.0, 0.0
    mended = [_corrected(facts, p, best) for p in policies]
    narrow, _ = _split(errors, policies, best)
    return best, math.exp(mean(narrow)), rank_correlation(mended, [p["kl"] for p in policies])


def _split(
    errors: Sequence[float], policies: Sequence[Json], layer: str
) -> tuple[list[float], list[float]]:
    """Errors of the policies that give a layer its fewest bits, and of all others."""
    bits = [tuple(p["widths"][layer]) for p in policies]
    least = min(bits, key=lambda pair: (pair[0] or 32, pair[1] or 32))
    chosen = list(zip(errors, bits, strict=True))
    return [e for e, b in chosen if b == least], [e for e, b in chosen if b != least]


def _corrected(facts: Facts, policy: Json, layer: str) -> float:
    """A prediction with the cost of one layer measured: what is left of the policies it is in."""
    weight, activation = policy["widths"][layer]
    own = facts.score(layer, "weight", weight) + facts.score(layer, "activation", activation)
    return float(policy["predicted"]) - own + own * _factor(facts, layer)


def _factor(facts: Facts, layer: str) -> float:
    """By what the score of a layer is to be multiplied, by least squares over the policies."""
    policies = (facts.validation or {}).get("policies") or []
    top = bottom = 0.0
    for p in policies:
        weight, activation = p["widths"][layer]
        own = facts.score(layer, "weight", weight) + facts.score(layer, "activation", activation)
        top += own * (p["kl"] - (p["predicted"] - own))
        bottom += own * own
    return max(top / bottom, 0.0) if bottom else 1.0


def _too_small(facts: Facts) -> Iterator[Finding]:
    """Accuracy that is lost though little was predicted.

    By Pinsker's inequality a mean divergence of `d` nats moves the probability of any class by at
    most `sqrt(d / 2)` on average.
    """
    found = lost_points(facts)
    if not facts.in_nats or not facts.total or found is None:
        return
    lost, noise = found
    most = 100 * math.sqrt(facts.total / 2) + noise
    if lost > most:
        yield Finding(
            "scores",
            (),
            "more accuracy is lost than the scores allow",
            f"{lost:.1f} points of top-1, where the predicted {facts.total:.3g} nats explain "
            f"{most:.1f} at most",
            "mpq analyze --metric kl --rescore --validate 50 --force; and check that mpq ptq had "
            "images of the right kind to calibrate on",
        )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rho: the correlation of the ranks, of which equal values share the mean."""
    ranks = []
    for values in (np.asarray(first), np.asarray(second)):
        order = np.sort(values)
        ranks.append(np.searchsorted(order, values) + np.searchsorted(order, values, "right"))
    return float(np.corrcoef(ranks)[0, 1])
