"""What this computer's CPU is and which instructions it has, as Linux tells it."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_VNNI = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8"})
_BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_X86 = ("x86_64", "amd64", "i386", "i686", "x86")


@dataclass(frozen=True, slots=True)
class Cpu:
    """One CPU.

    Args:
        name: its model, or its architecture where the system does not tell.
        flags: names of its instructions; empty where the system does not tell.
        x86: whether it is of that family.
        arm64: whether it is of that one.
    """

    name: str
    flags: frozenset[str]
    x86: bool
    arm64: bool = False

    @property
    def saturates(self) -> bool:
        """Whether its 8-bit products are added in 16 bits, saturating: x86 without VNNI.

        The careful answer where the system does not tell.
        """
        return self.x86 and not self.flags & _VNNI

    @property
    def lacks_bf16(self) -> bool:
        """Whether it is known to compute bfloat16 by other means, many times slower than float."""
        return bool(self.flags) and not self.flags & _BF16


@cache
def this_cpu(cpuinfo: Path = CPUINFO, machine: str | None = None) -> Cpu:
    """The CPU of this computer.

    Args:
        cpuinfo: Linux's description of it; a missing one tells nothing.
        machine: its architecture; None: that of this computer.
    """
    machine = machine or platform.machine()
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    return Cpu(
        name=model.group(1) if model else platform.processor() or machine,
        flags=frozenset(flags.group(1).split()) if flags else frozenset(),
        x86=machine.lower() in _X86,
        arm64=machine.lower() in ("aarch64", "arm64"),
    )
