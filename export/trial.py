"""Model files with loops are tried in a process of their own first, for a limited time.

The runtime folds what is constant while it loads a file, loops included, and cannot be stopped
while it does. A loop that never ends would hold whoever reads the file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from mpq.errors import ExportError
from mpq.limits import check_file, current, exceeded

LOOPS = (b"Loop", b"Scan")
TRIAL = "MPQ_TRIAL"
"""Set in the environment of the process that tries."""
_tried: set[tuple[str, int, int]] = set()


def hold(path: Path) -> None:
    """Refuse what is no regular file, too large, or not loaded and run once within the limit.

    Raises:
        ExportError: one of these.
    """
    check_file(path, "file_mb", ExportError)
    found = path.stat()
    key = (str(path.resolve()), found.st_size, found.st_mtime_ns)
    if TRIAL in os.environ or key in _tried:
        return
    if any(mark in path.read_bytes() for mark in LOOPS):
        _try(path)
    _tried.add(key)


def _try(path: Path) -> None:
    """Load and run the file once; whatever else goes wrong is reported by whoever loads it next."""
    script = str(Path(__file__).with_name("runtime.py"))
    try:
        subprocess.run(
            [sys.executable, "-P", script, str(path), "1", "1"],
            env={**os.environ, TRIAL: "1"},
            capture_output=True,
            timeout=current().onnx_seconds,
        )
    except subprocess.TimeoutExpired:
        got = "it has loops, and did not end"
        raise ExportError(exceeded(str(path), "onnx_seconds", got)) from None
