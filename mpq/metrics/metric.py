"""What a metric is, and how sure a difference between two networks is.

A metric keeps a part of each batch and makes a number of all parts. So it can be computed anew for
any choice of them: where the parts are values of single images the interval of a difference is that
of a mean of pairs, else it is found by drawing parts with replacement, the same ones for both
networks (B. Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpq.errors import UsageError

DEVIATIONS = 1.96
"""Of a normal distribution, on both sides of its mean: 95 %."""
DRAWS = 200


@dataclass(frozen=True)
class Metric:
    """A number for the answers of a network.

    Args:
        name: for reports.
        keep: what is kept of a batch, from the outputs and the batch: a list of parts. Floats are
            values of single images.
        total: the number that all parts give.
        higher: whether more is better.
        against: what answers are held against: what comes with the inputs in a batch, or what the
            float network answers (a batch is then the inputs and that answer).
        places: whether it reads a class for each place, where the only output is a map.
        draws: how often it is computed anew for an interval, where its parts are no floats.
    """

    name: str
    keep: Callable[[Any, Any], list[Any]]
    total: Callable[[Sequence[Any]], float]
    higher: bool = True
    against: Literal["batch", "float"] = "batch"
    places: bool = False
    draws: int = DRAWS

    def value(self, parts: Sequence[Any]) -> float:
        """The number of some parts.

        Raises:
            UsageError: there are none, or it is not finite.
        """
        if not parts:
            raise UsageError(f"the metric {self.name} needs at least one batch. Got none.")
        found = float(self.total(parts))
        if not math.isfinite(found):
            raise UsageError(
                f"the metric {self.name} must give a finite number. Got {found}. Look at what it "
                "divides by: a class that no image has, or answers that are not finite."
            )
        return found


@dataclass(frozen=True, slots=True)
class Loss:
    """What a network loses against another by a metric; negative where it gains.

    Args:
        value: in the metric's own unit.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    value: float
    low: float
    high: float


def mean(parts: Sequence[float]) -> float:
    """The `total` of values of single images."""
    return math.fsum(parts) / len(parts)


def compare(metric: Metric, before: Sequence[Any], after: Sequence[Any], seed: int = 0) -> Loss:
    """What is lost from `before` to `after`, parts of the same batches.

    Args:
        metric: that kept the parts.
        before: of the network that is right.
        after: of the other.
        seed: of the draws.
    """
    sign = 1 if metric.higher else -1
    lost = sign * (metric.value(before) - metric.value(after))
    if all(isinstance(part, float) for part in (*before, *after)):
        pairs = [sign * (one - two) for one, two in zip(before, after, strict=True)]
        spread = statistics.stdev(pairs) if len(pairs) > 1 else math.inf
        half = DEVIATIONS * spread / math.sqrt(len(pairs))
        return Loss(lost, lost - half, lost + half)
    rng, found = random.Random(seed), []
    for _ in range(metric.draws):
        picked = rng.choices(range(len(before)), k=len(before))
        one, two = (metric.total([parts[i] for i in picked]) for parts in (before, after))
        if math.isfinite(one) and math.isfinite(two):
            found.append(sign * (one - two))
    if len(before) < 2 or not found:
        return Loss(lost, -math.inf, math.inf)
    found.sort()
    cut = round(0.025 * (len(found) - 1))
    return Loss(lost, found[cut], found[-1 - cut])
