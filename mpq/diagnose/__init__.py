"""Diagnosis: for each problem that the files of a run show, its cause and a remedy.

- `finding`: `Finding` and `Diagnosis`; `facts`: what the files say
- `accuracy`, `integers`, `latency`, `scores`: the rules, from facts to findings
- `tensors`: what is unusual about weights and activations, measured (torch)

    diagnosis = findings(Facts.of(Path("runs/r20")))
"""

from __future__ import annotations

from mpq.diagnose import accuracy, integers, latency, scores
from mpq.diagnose.facts import Facts
from mpq.diagnose.finding import PROBLEMS, Diagnosis, Finding
from mpq.errors import UsageError
from mpq.verb import callable_package

__all__ = ["PROBLEMS", "Diagnosis", "Facts", "Finding", "findings"]
RULES = (accuracy.find, integers.find, latency.find, scores.find)
"""What is asked, in the order in which it is told."""


def findings(facts: Facts) -> Diagnosis:
    """What the facts of a run show; no torch and nothing that runs a network.

    Raises:
        UsageError: a file lacks what every such file has.
    """
    try:
        found = tuple(one for rule in RULES for one in rule(facts))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        lacks = f"It lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UsageError(
            f"one of {', '.join(facts.looked_at)} is not as mpq writes it. {lacks}. Write it again."
        ) from error
    return Diagnosis(found, facts.looked_at, facts.missing)


callable_package(__name__)
