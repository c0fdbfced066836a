"""What is checked before hours of training begin, rather than found out after them."""

from __future__ import annotations

from pathlib import Path

from mpq import rundir
from mpq.errors import CheckpointError, UsageError
from mpq.policy import ModelInfo
from mpq.processes import leading
from mpq.train.ensemble import Ensemble
from mpq.train.resume import CHECKPOINT


def check_start(
    folder: Path, out: Path, *, resume: bool, force: bool, state: str = CHECKPOINT
) -> bool:
    """Refuse to lose an unfinished or a finished run; say whether there is a state to resume from.

    Of several processes the leading one refuses.

    Args:
        folder: where the work keeps its state while it runs.
        out: what it writes in the end.
        resume: go on from the checkpoint, where there is one; what stands at `out` was given up
            when it began.
        force: start anew all the same.
        state: the name of the file of that state.

    Raises:
        UsageError: what `resume` and `force` ask for does not fit what is there.
    """
    checkpoint = folder / state
    if resume and checkpoint.is_file():
        return True
    if not leading():
        return False  # the leading process may have begun to write already
    if resume and out.exists() and not force:
        raise UsageError(
            f"--resume must find {checkpoint}, but it does not exist: {out} is finished. Use it, "
            "or make it anew with --force."
        )
    if checkpoint.exists() and not force:
        raise UsageError(
            f"{folder} holds an unfinished run ({state}). Go on with --resume, start anew "
            "with --force, or write elsewhere with -o."
        )
    rundir.refuse_overwrite(out, force)
    return False


def check_teacher(teacher: Ensemble | None, info: ModelInfo) -> None:
    """Refuse teachers of other classes or channels than the student's.

    Raises:
        CheckpointError: a member has another number of classes or channels.
    """
    for member in teacher.members if teacher else ():
        if member.classes and member.classes != info.classes:
            raise CheckpointError(
                f"teacher {member.name} must have the {info.classes} classes of {info.arch}. "
                f"Got {member.classes}. Give teachers that were trained on the same data."
            )
        if member.input and member.input[0] != info.input[0]:
            raise CheckpointError(
                f"teacher {member.name} must take images of {info.input[0]} channels, as "
                f"{info.arch} does. Got {member.input[0]}."
            )
