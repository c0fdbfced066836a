"""What mpq raises. Every message says what, where, what it must be, what it got, what to try.

A child also inherits the builtin that a library user would expect to catch. The command line
turns any `MpqError` into one message and exit code 2.
"""

from __future__ import annotations

import difflib
import re
import textwrap
from collections.abc import Iterable


class MpqError(Exception):
    """Base of all errors that a user can cause and mend."""


class PolicyError(MpqError, ValueError):
    """A policy file or a choice in it is not usable."""


class CheckpointError(MpqError, ValueError):
    """A checkpoint cannot be read, trusted, or matched with an architecture."""


class DataError(MpqError, ValueError):
    """Data is missing or not what the model needs."""


class GraphError(MpqError, ValueError):
    """A model cannot be traced or rewritten."""


class InfeasibleError(MpqError, ValueError):
    """No policy meets the constraints; the message names the achievable range."""


class TrainError(MpqError, RuntimeError):
    """Training cannot go on (a NaN, a checkpoint of another run)."""


class ExportError(MpqError, RuntimeError):
    """A file cannot be written as promised, or does not answer as promised."""


class UsageError(MpqError, ValueError):
    """An option or a combination of options makes no sense, or an input file is missing."""


def printable(text: str) -> str:
    """A text as a terminal may get it: control characters, which it would obey, are escaped."""
    plain = (c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    return "".join(plain)


def folded(text: str, width: int) -> str:
    """A text whose lines are broken between words at `width`; a `command` in it stays whole."""
    bound = re.sub(r"`[^`]*`", lambda found: found[0].replace(" ", "\xa0"), text)
    lines = (
        textwrap.fill(
            line,
            width,
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=" " * (len(line) - len(line.lstrip())),
        )
        for line in bound.split("\n")
    )
    return "\n".join(lines).replace("\xa0", " ")


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """Return `; did you mean A, B?` for the closest known names, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
    return f"; did you mean {', '.join(close)}?" if close else ""
