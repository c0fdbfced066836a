"""A stage's files appear together: written aside, then put in place as one step.

The step is the rename of the folder beside the run's files that holds the new ones, from `.aside-*`
to `.ready`. A command that is killed before it leaves the run as it was; what is killed after it is
put in place by the next command that looks into the run (`settle`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mpq import interrupts

ASIDE, READY = ".aside-", ".ready"


@contextlib.contextmanager
def together(folder: Path) -> Iterator[Path]:
    """A folder to write the files of a stage to; they take their places in `folder` at the end.

    A file that is left empty there says that the stage has none of that name: the one in `folder`
    was of an earlier stage and goes. If the block raises, nothing changes.

    Raises:
        OSError: `folder` cannot be written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settle(folder)
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=folder))
    try:
        yield aside
        interrupts.check()
        os.rename(aside, folder / READY)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    settle(folder)


def settle(folder: Path) -> None:
    """Put in place what a finished stage has written aside, and remove what unfinished ones left.

    To be called where nobody else writes into `folder`.

    Raises:
        OSError: `folder` cannot be written to.
    """
    ready = folder / READY
    for part in sorted(ready.iterdir()) if ready.is_dir() else ():
        if part.stat().st_size:
            os.replace(part, folder / part.name)
        else:
            (folder / part.name).unlink(missing_ok=True)
            part.unlink()
    if ready.is_dir():
        ready.rmdir()
    for left in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(left, ignore_errors=True)
