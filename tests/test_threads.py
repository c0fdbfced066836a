"""How many threads a command computes with: affinity, CPU quota, the environment, `--threads`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpq import threads
from mpq.cli import COMMANDS, main

CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, CPUS),
        ({"a/b/cpu.max": "max 100000"}, CPUS),
        ({"a/b/cpu.max": "100000 100000"}, 1),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "20000 100000"}, 1),
        ({"other/cpu.max": "20000 100000", "a/b/cpu.max": "6400000 100000"}, CPUS),
        ({"a/b/cpu.max": "not a quota"}, CPUS),
    ],
)
def test_a_quota_of_any_group_above_this_process_counts(
    tmp_path: Path, files: dict[str, str], cpus: int
) -> None:
    for name, text in files.items():
        write(tmp_path / "cg" / name, text)
    write(tmp_path / "own", "0::/a/b\n")
    assert threads.allowed(tmp_path / "cg", tmp_path / "own") == cpus


@pytest.mark.parametrize(("quota", "cpus"), [("-1", CPUS), ("100000", 1)])
def test_groups_of_version_one(tmp_path: Path, quota: str, cpus: int) -> None:
    folder = tmp_path / "cg" / "cpu" / "a"
    write(folder / "cpu.cfs_quota_us", quota)
    write(folder / "cpu.cfs_period_us", "100000")
    write(tmp_path / "own", "4:memory:/a\n1:cpu,cpuacct:/a\n0::/\n")
    assert threads.allowed(tmp_path / "cg", tmp_path / "own") == cpus


def test_no_control_groups_at_all(tmp_path: Path) -> None:
    assert threads.allowed(tmp_path / "none", tmp_path / "neither") == CPUS


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(threads, "allowed", lambda: 0)
    threads.settle()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ["OMP_NUM_THREADS"] == "3"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_a_command_bound_to_one_processor_starts_one_thread() -> None:
    code = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
os.environ.pop("OMP_NUM_THREADS", None), os.environ.pop("OMP_WAIT_POLICY", None)
from mpq.cli import main
main(["cache"])
import torch
print(os.environ["OMP_WAIT_POLICY"], torch.get_num_threads())
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.split()[-2:] == ["PASSIVE", "1"]


def test_every_command_takes_threads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in COMMANDS:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.count("--threads N") == 1, name


def test_threads_are_used_by_this_process_and_those_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", str(before))
    try:
        assert main(["cache", "--threads", "3"]) == 0
        assert torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
    finally:
        torch.set_num_threads(before)
    assert main(["cache", "--threads", "0"]) == 2
    assert "--threads" in capsys.readouterr().err
