"""How many threads a command computes with, and how they wait for each other.

Nothing here loads torch: OpenMP reads its environment once, when torch is loaded, so what it is to
know must stand there before.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def allowed(root: Path = CGROUPS, own: Path = OWN_CGROUPS) -> int:
    """Processors that this process may keep busy, at least 1: its affinity and its CPU quota.

    Args:
        root: where control groups are mounted.
        own: which of them this process is in, as Linux tells it (cgroups(7)).
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([cpus, *_quotas(root, own)])))


def settle() -> None:
    """Tell OpenMP, before torch is loaded, to wait passively and to start no more than `allowed`.

    Threads that spin while they wait take the processor from those they wait for as soon as another
    process wants it. What the user has set in the environment stays.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    threads = allowed()
    if threads < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


def use(threads: int) -> None:
    """Compute with that many threads, in this process and in those it starts."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)


def _quotas(root: Path, own: Path) -> Iterator[float]:
    """Processors that each control group above this process may use in the mean."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mounted = root / "cpu" if controllers else root
        group = mounted / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mounted):
                break
            yield from _quota(folder)


def _quota(folder: Path) -> Iterator[float]:
    """Of one group: version 2 keeps quota and period in one file, version 1 in two."""
    words = _read(folder / "cpu.max").split() or [
        *_read(folder / "cpu.cfs_quota_us").split(),
        *_read(folder / "cpu.cfs_period_us").split(),
    ]
    if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():  # not "max", not -1
        yield int(words[0]) / int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
