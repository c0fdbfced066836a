"""Evaluate what was kept again, and say where a figure differs."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.study import networks, quantized
from benchmarks.study.plan import Plan
from benchmarks.study.results import read_csv
from mpq.errors import UsageError
from mpq.export.bench import file_bytes
from mpq.export.certify import certify
from mpq.pipeline.exporting import export_float
from mpq.pipeline.subject import Subject

TOLERANCE = 0.05
"""Points of top-1: another CPU rounds a few sums the other way."""


def check(
    results: Path,
    plan: Plan,
    *,
    only: tuple[str, ...] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> list[str]:
    """Measure every kept file of a results folder again.

    Args:
        results: with `rows.csv`.
        plan: the plan that it was made from.
        only: names of rows; all without any.
        tell: told of each row.

    Returns:
        What differs, a sentence each; nothing where all is as it was written.

    Raises:
        UsageError: no results are there, or `only` names a row that is none.
    """
    if not (results / "rows.csv").is_file():
        raise UsageError(f"{results} must hold rows.csv, as a study writes it, but does not.")
    rows = read_csv(results / "rows.csv")
    unknown = set(only) - {r["row"] for r in rows}
    if unknown:
        raise UsageError(f"rows must be some of {results}. Got {', '.join(sorted(unknown))}.")
    wrong: list[str] = []
    for row in rows:
        if only and row["row"] not in only:
            continue
        name = f"{row['row']} (seed {row['seed']})"
        if not row["checkpoint"]:
            tell(f"{name}: its files were not kept")
            continue
        found = _check_row(results, plan, row)
        tell(f"{name}: {found or 'as written'}")
        wrong += [f"{name}: {text}" for text in found]
    return wrong


def _check_row(results: Path, plan: Plan, row: dict[str, str]) -> list[str]:
    subject = networks.load_subject(results / row["checkpoint"], plan.data)
    if row["file"]:
        return _compare(results / row["file"], subject, row, exact=True)
    with tempfile.TemporaryDirectory() as folder:
        path = export_float(subject, Path(folder) / quantized.MODEL)
        return _compare(path, subject, row, exact=False)


def _compare(path: Path, subject: Subject, row: dict[str, str], *, exact: bool) -> list[str]:
    wrong = []
    if exact and hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
        wrong.append(f"{path} is not the file that was measured: its sha256 differs")
    if exact and file_bytes(path) != int(row["bytes"]):
        wrong.append(f"bytes must be {row['bytes']}. Got {file_bytes(path)}")
    if exact and row["integer_coverage"]:
        coverage = round(certify(path, target=row["target"]).integer_macs_fraction, 4)
        if coverage != float(row["integer_coverage"]):
            wrong.append(f"integer coverage must be {row['integer_coverage']}. Got {coverage}")
    split = "test" if row["test_top1"] else "validation"
    column = f"{split}_top1"
    if row[column]:
        found = quantized.measured(path, subject, split)
        if found is None or abs(found - float(row[column])) > TOLERANCE:
            wrong.append(f"{split} top-1 must be {row[column]}. Got {found}")
    return wrong
