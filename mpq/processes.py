"""The processes that `accelerate launch` or `torchrun` started: who this one is, and how it leaves.

No torch before it is needed: one process on its own pays nothing.
"""

from __future__ import annotations

import atexit
import os


def leading() -> bool:
    """Whether this process writes files: the only one, or the first of those a launcher started.

    Launchers number them in `RANK`.
    """
    return os.environ.get("RANK", "0") == "0"


def ranks_of() -> tuple[int, int]:
    """Number of this process and how many there are: (0, 1) where no launcher started it."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return 0, 1
    from accelerate import PartialState  # a second of import

    # Scores are computed where the images lie; what is exchanged is small and lies on the CPU.
    state = PartialState(cpu=True)
    leave_at_exit()
    return state.process_index, state.num_processes


def leave_at_exit() -> None:
    """Leave the process group in order when Python ends.

    An interpreter that ends within a group destroys gloo's threads while they run, and now and
    then aborts (SIGABRT) after all work is done. A second call changes nothing.
    """
    atexit.unregister(_leave)
    atexit.register(_leave)


def _leave() -> None:
    from accelerate import PartialState

    PartialState().destroy_process_group()
