"""What the trial of faults counts: `make test` runs a short form, `make test-faults` a long one.

The long form (`MPQ_FAULTS=1`) tries more of each kind, and writes the table of `docs/security.md`
if nothing was lost: a try that is neither refused nor survived fails its test.
"""

from __future__ import annotations

import os
import re
import resource
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LONG = "MPQ_FAULTS" in os.environ
PAGE = Path(__file__).parents[2] / "docs" / "security.md"
TABLE = re.compile(r"(<!-- trial -->\n).*?(<!-- end of trial -->)", re.DOTALL)
KINDS = {
    "test_code": "code that a file asks for",
    "test_hostile": "hostile checkpoints, policies, images",
    "test_interrupts": "signals, caught on the way",
    "test_messages": "full disks, loops, metadata, names",
    "test_writers": "two writers",
}
"""What one test of a file is a try of; files that count for themselves are not here."""

_tally: dict[str, Counter[str]] = defaultdict(Counter)

Tell = Callable[[str, str], None]


@pytest.fixture
def tell() -> Tell:
    """Count a try: its kind, and `refused` or `survived`."""

    def add(kind: str, outcome: str) -> None:
        _tally[kind][outcome] += 1

    return add


@pytest.fixture
def tries() -> Callable[[int, int], range]:
    """How often: so often in the short form, and so often in the long one."""
    return lambda short, long: range(long if LONG else short)


@pytest.fixture(autouse=True, scope="session")
def memory() -> Iterator[None]:
    """No try may take more than 1 GB above what the libraries themselves take."""
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    _tally["peak"]["GB"] = round(1000 * peak)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test that passed as one try."""
    kind = KINDS.get(Path(report.fspath).stem)
    if kind and report.when == "call" and report.passed:
        _tally[kind]["refused"] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table of a long form in which nothing was lost."""
    if not LONG or exitstatus:
        return
    peak = _tally.pop("peak")["GB"] / 1000
    total = sum(sum(counts.values()) for counts in _tally.values())
    rows = [
        f"| {kind} | {sum(n.values()):,} | {n['refused']:,} | {n['survived']:,} | 0 |"
        for kind, n in sorted(_tally.items())
    ]
    table = "\n".join(
        [
            "| kind | tries | refused | survived | lost |",
            "|---|---|---|---|---|",
            *rows,
            f"| all | {total:,} | | | 0 |",
            "",
            f"The process that made all tries held {peak:.2f} GB at most, torch and the runtime "
            "included.",
            "",
        ]
    )
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda m: m[1] + table + m[2], text), encoding="utf-8")
