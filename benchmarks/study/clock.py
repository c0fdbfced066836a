"""A time limit that long work asks, so that it stops between two epochs and not within one."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpq.train.plan import Stop


class TimeUpError(Stop):
    """The time is up; what was finished is saved, and the next call goes on from there."""


class Clock:
    """How much of a limit is left.

    Args:
        minutes: the limit; None: there is none.
        now: seconds on a clock that never goes back.
    """

    def __init__(
        self, minutes: float | None = None, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        self.now = now
        self.end = float("inf") if minutes is None else now() + 60 * minutes

    def left(self) -> float:
        """Seconds; negative where it is over."""
        return self.end - self.now()

    def ask(self, seconds: float = 0.0) -> None:
        """Whether work of so many seconds may begin.

        Raises:
            TimeUpError: it would not end in time.
        """
        if self.left() < seconds:
            raise TimeUpError
