"""`Finding`: one problem with its cause and remedy; `Diagnosis`: all of a run. No torch here."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from mpq.shown import Shown

Problem = Literal["accuracy", "integers", "latency", "scores"]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem that the files of a run show.

    Args:
        problem: what suffers.
        where: the layers, as policies name them; empty: the whole network.
        cause: what is wrong, in a line.
        evidence: the figures that say so.
        remedy: what to try.
        gain: what that brings, measured or computed from what was measured; empty where nobody
            knows before it is tried.
    """

    problem: Problem
    where: tuple[str, ...]
    cause: str
    evidence: str
    remedy: str
    gain: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """The findings of a run.

    Args:
        findings: by problem, the gravest of each first.
        looked_at: the files that were asked.
        missing: what was not there to be asked: the file, and the command that writes it.
    """

    TABLES: ClassVar[tuple[str, ...]] = ()
    findings: tuple[Finding, ...] = ()
    looked_at: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of `diagnosis.json`."""
        return {
            "findings": [{**asdict(one), "where": list(one.where)} for one in self.findings],
            "looked_at": list(self.looked_at),
            "missing": dict(self.missing),
        }

    def shown(self) -> list[str]:
        """A paragraph for each finding, and what was looked at."""
        told = [line for number, one in enumerate(self.findings, 1) for line in _told(number, one)]
        told += [] if told else ["nothing to report"]
        told += _wrapped("looked at: ", ", ".join(self.looked_at) or "nothing")
        for name, command in self.missing.items():
            told += _wrapped(f"not known without {name}: ", command)
        return told


def _told(number: int, one: Finding) -> list[str]:
    """A finding in lines, of which each says what it is."""
    where = listed(one.where) if one.where else "the whole network"
    gain = one.gain or "not known before it is tried"
    lines = _wrapped(f"{number}. ", f"{one.problem}: {one.cause}")
    for name, text in (("where", where), ("evidence", one.evidence), ("try", one.remedy)):
        lines += _wrapped(f"   {name:<10}", text)
    return [*lines, *_wrapped(f"   {'gain':<10}", gain)]


def _wrapped(head: str, text: str) -> list[str]:
    """A text after its head, on lines of 80 characters, aligned."""
    return textwrap.wrap(
        text,
        80,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )


def listed(names: Sequence[str], most: int = 4) -> str:
    """Names with commas, the first few of many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
