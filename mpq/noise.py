"""How much of a measured accuracy is chance: intervals for shares of few images. No torch here."""

from __future__ import annotations

import math

Z = 1.959964
"""Standard deviations on both sides of the middle that hold 95 % of a normal distribution."""
EXACT_DB = 999.0
"""What a file holds where there is no noise at all: JSON has no infinity."""


def interval(percent: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share, in percent.

    Wilson, "Probable inference, the law of succession, and statistical inference", 1927: right near
    0 and 100 too.

    Args:
        percent: of the images that were met, 0 to 100.
        count: of images, at least 1.
    """
    p, z2 = percent / 100, Z * Z
    middle = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def margin(first: float, second: float, count: int) -> float:
    """By how many points two shares of the same images may differ by chance, 95 % of the time.

    The images are taken as if each share had its own, which is the careful answer: two networks
    that err on the same images differ by less.
    """
    halves = [(high - low) / 2 for low, high in (interval(p, count) for p in (first, second))]
    return math.hypot(*halves)
