"""What the trial of faults counts: `make test` runs a short form, `make test-faults` a long one.

The long form (`MPQ_FAULTS=1`) tries more of each kind, and writes the table of `docs/security.md`
if nothing was left out and nothing lost: a try that is neither refused nor survived fails its test.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from nets import MINE

from mpq.cli import main

LONG = "MPQ_FAULTS" in os.environ
PAGE = Path(__file__).parents[2] / "docs" / "security.md"
TABLE = re.compile(r"(<!-- trial -->\n).*?(<!-- end of trial -->)", re.DOTALL)
KINDS = {
    "test_code": "code that a file asks for",
    "test_hostile": "hostile checkpoints, policies, images",
    "test_interrupts": "signals, caught on the way",
    "test_messages": "full disks, loops, metadata, names",
    "test_stale": "stale files",
    "test_writers": "two writers",
}
"""What one test of a file is a try of; files that count for themselves are not here."""

_tally: dict[str, Counter[str]] = defaultdict(Counter)
_left_out: list[str] = []

Tell = Callable[[str, str], None]
EVIL = """
from pathlib import Path
Path("RAN").touch()
from mine import tiny, images
"""


@pytest.fixture(scope="session")
def project(once: Any) -> Iterator[Path]:
    """A run over code of the user's own, which is named once, and then never again."""
    train = ["train", "mine:tiny", "--data", "mine:images", "-o", "model.pth", "--epochs", "1"]
    named = ["--model", "mine:tiny", "--data", "mine:images"]

    def make(folder: Path) -> None:
        (folder / "mine.py").write_text(MINE)
        (folder / "evil.py").write_text(EVIL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", str(folder / "state"))
            assert main(train) == 0
            assert main(["analyze", "model.pth", *named, "--num-calib", "16", "-o", "r"]) == 0
            assert main(["ptq", "--policy", "r", "--num-calib", "16", "--effort", "fast"]) == 0
            assert main(["export", "r", "--num-test", "10"]) == 0
            assert main(["verify", "r", "--num-test", "10"]) == 0
            assert main(["bench", "r", "--runs", "2"]) == 0
            tell = ["ensemble", "model.pth", "-o", "ens.pth", "--trust-code", "mine:tiny"]
            assert main([*tell, "--data", "mine:images"]) == 0

    yield once("faults", make)
    sys.modules.pop("mine", None)


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the project, as working directory."""
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "p" / "state"))
    yield tmp_path / "p"
    sys.modules.pop("evil", None)


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


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """No try may take 1 GB more than what the process has held before."""
    before = peak(resource.RUSAGE_SELF)
    yield
    assert peak(resource.RUSAGE_SELF) - before < 1.0


def peak(whose: int) -> float:
    """The most memory that this process, or the largest of its children, has held, in GB."""
    return resource.getrusage(whose).ru_maxrss / 1e6


def pytest_deselected(items: list[pytest.Item]) -> None:
    """A run that leaves tests out writes no table."""
    _left_out.extend(item.nodeid for item in items)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count a test that passed as one try."""
    if report.skipped:
        _left_out.append(report.nodeid)
    kind = KINDS.get(Path(report.fspath).stem)
    if kind and report.when == "call" and report.passed:
        _tally[kind]["refused"] += 1


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the table of a whole long form in which nothing was lost, run by one process."""
    folder = Path(__file__).parent
    collected = {Path(item.path) for item in session.items}
    apart = "PYTEST_XDIST_WORKER" in os.environ or session.config.getoption("dist", "no") != "no"
    whole = not _left_out and not apart and collected == set(folder.glob("test_*.py"))
    if not LONG or exitstatus or not whole:
        return
    held, child = peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)
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
            f"The process that made all tries held {held:.2f} GB at most, torch and the runtime "
            f"included; of the processes that it started none more than {child:.2f} GB.",
            "",
        ]
    )
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(TABLE.sub(lambda m: m[1] + table + m[2], text), encoding="utf-8")
