"""`report`: the page of a run, or of several side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from mpq import origins, rundir
from mpq.errors import MpqError
from mpq.report.compare import write_comparison
from mpq.report.page import write_page

logger = logging.getLogger(__name__)
COMPARISON = "compare.html"


def report_run(folder: Path) -> Path:
    """Write `report.html` into a run and return its path; the first time, look at its tensors too.

    Raises:
        UsageError: it is no run, or a file in it is not what it should be.
        PolicyError: its policy cannot be read.
    """
    rundir.tidy(folder)
    if folder.is_dir():
        rundir.refuse_overwrite(folder / "report.html", force=True)
    quantized = _network(folder)
    if quantized is not None:
        from mpq.pipeline.ranges import write_ranges  # torch: seconds of import

        try:
            write_ranges(folder, quantized)
        except MpqError as error:
            logger.warning("no histograms: %s", error)
    return write_page(folder)


def _network(folder: Path) -> Path | None:
    """The quantized network of a run: that of its `model.onnx`, else the newest."""
    made_of = origins.made_of(folder / "model.onnx", rundir.QUANTIZED)
    if made_of is not None and (folder / made_of).is_file():
        return folder / made_of
    return origins.newest(folder, rundir.QUANTIZED)


def report_runs(folders: Sequence[Path]) -> Path:
    """Write one page of several runs, `compare.html` beside the first, and return its path.

    Raises:
        UsageError: fewer than two, or as `report_run`.
        PolicyError: as `report_run`.
    """
    for folder in folders:
        rundir.tidy(folder)
    path = folders[0].absolute().parent / COMPARISON if folders else Path(COMPARISON)
    rundir.refuse_overwrite(path, force=True)
    return write_comparison(folders, path)
