"""What a command is asked to measure. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Wishes:
    """`--metric` and the options that go with it.

    Args:
        metric: a name, `module:name`, an object or a function (`mpq.metrics.given`); None: top-1
            where there is one.
        lower: whether less of it is better.
        postprocess: what is applied to the outputs before; a name or a function.
        batches: as a training loop has them, or the name of what gives them.
    """

    metric: Any = None
    lower: bool = False
    postprocess: Any = None
    batches: Any = None
