"""Keep the memory that a step frees for the next step, which glibc by itself does not.

glibc takes every large tensor from the system by itself and gives it back when it is freed, so that
each step faults in the same gigabytes page by page. Other allocators (a preloaded jemalloc or
tcmalloc) and other systems are left as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
LARGE = 2**30
"""Bytes: larger tensors still come from the system and go back to it."""
SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
"""Where a user decides about memory; then nothing is changed here."""


def keep_freed() -> bool:
    """Let this process keep what it frees, for good; returns whether it does.

    `mpq`'s commands call it. A loop of your own may do so, before or after it has begun: the
    process stays as large as it was at most, and its steps take less time.
    """
    if not sys.platform.startswith("linux") or any(os.environ.get(name) for name in SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc's; musl has none
    return bool(
        mallopt is not None
        and mallopt(MMAP_THRESHOLD, LARGE)
        and mallopt(TRIM_THRESHOLD, 2**31 - 1)
    )
