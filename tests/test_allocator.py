"""Memory that is freed stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mpq import allocator

CHILD = """
import resource, sys
import torch
from mpq.allocator import keep_freed

if sys.argv[1] == "keep" and not keep_freed():
    sys.exit("not glibc, or the user decides")

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def step():
    return float(torch.ones(10_000_000).mul(2).sum())  # two tensors of 40 MB

torch.set_num_threads(1)
for _ in range(20):  # until the heap has room for both wherever they come to lie
    step()
before = faults()
for _ in range(5):
    assert step() == 20_000_000
print(faults() - before)
"""


def kept_in_a_process_of_its_own() -> bool:
    """Whether memory can be kept here; to ask changes the process that does."""
    code = "import sys; from mpq.allocator import keep_freed; sys.exit(not keep_freed())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def faults(mode: str) -> int:
    """Page faults of five steps; in a process of its own, as what is kept is kept for good."""
    done = subprocess.run([sys.executable, "-c", CHILD, mode], capture_output=True, text=True)
    if done.returncode and "the user decides" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_steps_do_not_fault_in_what_was_freed():
    assert faults("keep") < 1_000
    assert faults("leave") > 10_000  # else there is nothing to keep: drop the module


@pytest.mark.parametrize("name", allocator.SETTINGS)
def test_a_user_who_decides_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not allocator.keep_freed()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed()
