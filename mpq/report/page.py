"""The page of a run: `report.html`."""

from __future__ import annotations

from pathlib import Path

from mpq import files
from mpq.report.contents import Contents
from mpq.report.headline import head
from mpq.report.render import render
from mpq.report.sections import sections


def write_page(folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Raises:
        UsageError: no such folder, nothing of a run in it, or a file that is not what it should be.
        PolicyError: the same of `policy.yaml`.
    """
    path = folder / "report.html"
    files.write_text(path, page(folder))
    return path


def page(folder: Path) -> str:
    """The HTML of a run folder (errors as of `write_page`)."""
    run = Contents(folder)
    return render(head(run), sections(run), f"run {run.name}")
