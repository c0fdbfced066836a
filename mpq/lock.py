"""One writer at a time: a lock on a run folder or a file, which says who holds it and since when.

`flock`, since the system gives it back when its owner ends, however it ends: nobody has to decide
whether a lock is stale. Linux carries it over NFS as a lock on the file's bytes. Libraries over the
same call (filelock) empty the file when they open it, and with it the name of who holds the lock.
Where a file system knows no locks, or the system no `flock` (Windows), there is a warning and none.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

from mpq.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)
_BUSY = (errno.EWOULDBLOCK, errno.EACCES)


@contextlib.contextmanager
def held(file: Path, what: Path) -> Iterator[None]:
    """Hold a lock while the block runs.

    Folders that are missing are made, and those that are still empty in the end removed again.

    Args:
        file: of the lock; it is there as long as the lock is held.
        what: what nobody else may write meanwhile, for messages.

    Raises:
        UsageError: somebody else holds it, and the message says who and since when; or the folder
            cannot be made or written to.
    """
    try:
        made = [p for p in (file.parent, *file.parent.parents) if not p.exists()]
        file.parent.mkdir(parents=True, exist_ok=True)
        taken = _take(file, what)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}"
        raise UsageError(f"{what} cannot be written: {why}. Write elsewhere with -o.") from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is ours: who waits for it sees that it has gone
        taken.close()
        with contextlib.suppress(OSError):  # something has been written there
            for folder in made:
                folder.rmdir()


def _take(file: Path, what: Path) -> BinaryIO:
    """The open file with its lock. One that was removed while it was opened is opened anew."""
    while True:
        opened = open(file, "a+b")  # noqa: SIM115 - open as long as it is locked
        if not _locked(opened, file):
            owner = _owner(opened)
            opened.close()
            raise UsageError(
                f"{what} is being written by {owner}. Wait until it is done, stop it, or write "
                "elsewhere with -o."
            )
        try:
            if os.path.samestat(os.fstat(opened.fileno()), os.stat(file)):
                break
        except FileNotFoundError:
            pass
        opened.close()
    opened.truncate(0)
    opened.write(json.dumps(_self()).encode())
    opened.flush()
    return opened


def _locked(opened: BinaryIO, file: Path) -> bool:
    """Whether the lock is ours now; False if somebody has it."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has none")
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _BUSY:
            return False
        logger.warning(
            "%s: no locks here (%s): see to it that one command writes there at a time",
            file.parent,
            error.strerror,
        )
    return True


def _self() -> dict[str, str | int]:
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:200],
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().isoformat(sep=" ", timespec="seconds"),
    }


def _owner(opened: BinaryIO) -> str:
    """Who holds the lock, as its file says."""
    try:
        opened.seek(0)
        owner = json.loads(opened.read(10_000))
        return (
            f"`{owner['command']}` (process {owner['process']} on {owner['host']}, "
            f"since {owner['since']})"
        )
    except (OSError, ValueError, TypeError, KeyError):  # it is just being written
        return "another command"
