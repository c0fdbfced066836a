"""Ctrl-C and SIGTERM, alike: an exception, and a mark that remains where somebody swallows it.

Libraries that work inside an import, or catch whatever is raised (torch's exporter does both), can
turn an interrupt into another error or into none. Whoever is about to put files in place asks
`check`, and what is raised after a signal is taken for it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A signal that ends the command."""


_seen: list[int] = []


def seen() -> int | None:
    """The signal that came while `watching`; None if none did."""
    return _seen[-1] if _seen else None


def check() -> None:
    """Stop here if a signal has come, even if somebody has swallowed it.

    Raises:
        Interrupted: one has.
    """
    if _seen:
        raise Interrupted


@contextlib.contextmanager
def watching() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into `Interrupted` while the block runs.

    What is ignored or handled otherwise (`nohup`, a library around mpq) stays so.
    """
    _seen.clear()
    default = (signal.SIG_DFL, signal.default_int_handler)
    mine = threading.current_thread() is threading.main_thread()
    both = (signal.SIGINT, signal.SIGTERM) if mine else ()
    watched = [number for number in both if signal.getsignal(number) in default]
    before = {number: signal.signal(number, _handle) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    _seen.append(number)
    raise Interrupted
