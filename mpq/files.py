"""Files that are written whole or not at all: a temporary file beside the target, then a rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from mpq.errors import UsageError

PART = ".mpq-part"
ROOM = 1_000_000
"""Bytes: a folder with less is full."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, that takes the place of `path` when the block ends without an error.

    Raises:
        OSError: the disk is full or the place not writable; what was there before is untouched.
    """
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # mkstemp's files are for their owner only
        os.replace(part, path)
    except BaseException as error:
        Path(part).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, part):
            error.filename = str(path)  # a full disk does not say of which file it speaks
        raise


def sweep(folder: Path, name: str = "*", *, older_than: float = 0.0) -> None:
    """Remove the temporary files that killed commands have left.

    Args:
        folder: where they lie.
        name: of the files that they were to become.
        older_than: seconds since they were last written to; 0 where nobody else can be writing.
    """
    for part in folder.glob(f".{name}.*{PART}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime >= older_than:
                part.unlink()


@contextmanager
def scratch() -> Iterator[Path]:
    """A temporary folder. Where no room is left in it, that is told of whatever fails.

    Raises:
        UsageError: there is no room, or no folder for temporary files at all.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="mpq-")
    except OSError as error:
        raise UsageError(
            f"no temporary folder can be made: {error.strerror}. Make room, or set TMPDIR to a "
            "folder that can be written to."
        ) from None
    with made:
        try:
            yield Path(made.name)
        except Exception as error:
            refuse_full(Path(made.name), error)
            raise


def refuse_full(folder: Path, error: BaseException | None) -> None:
    """Blame a folder for temporary files, rather than what was being worked on, if it is full.

    Raises:
        UsageError: it is, after `error`.
    """
    free = shutil.disk_usage(folder).free
    if free < ROOM:
        raise UsageError(
            f"the temporary folder {folder.parent} is full: {free / 1e6:.1f} MB are free. Make "
            "room, or set TMPDIR to another folder."
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file; missing folders are made. Raises `OSError` as `atomic_file`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON.

    Raises:
        ValueError: a number that JSON does not have (NaN, infinity); nothing is written.
    """
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
