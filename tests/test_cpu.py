from __future__ import annotations

from pathlib import Path

import pytest

from mpq.cpu import this_cpu


@pytest.mark.parametrize(
    ("flags", "machine", "saturates", "lacks_bf16"),
    [
        ("avx2 fma", "x86_64", True, True),
        ("avx512f avx512_vnni", "x86_64", False, True),
        ("avx512_vnni avx512_bf16", "AMD64", False, False),
        ("avx2 avx_vnni", "x86_64", False, True),
        ("avx2 fma", "aarch64", False, True),
    ],
)
def test_flags_decide(
    tmp_path: Path, flags: str, machine: str, saturates: bool, lacks_bf16: bool
) -> None:
    info = tmp_path / "cpuinfo"
    told = f"model name\t: A CPU\nflags\t\t: fpu {flags}\nbugs\t: avx_vnni\n"
    info.write_text(f"processor\t: 0\n{told}")
    cpu = this_cpu(info, machine)
    assert cpu.name == "A CPU"
    assert (cpu.saturates, cpu.lacks_bf16) == (saturates, lacks_bf16)


def test_arm_calls_them_features(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("Features\t: asimd bf16\n")
    assert not this_cpu(info, "aarch64").lacks_bf16


def test_where_nothing_is_told_the_answers_are_careful(tmp_path: Path) -> None:
    cpu = this_cpu(tmp_path / "none", "AMD64")
    assert cpu.name
    assert cpu.saturates
    assert not cpu.lacks_bf16
