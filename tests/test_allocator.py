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

def step():
    return float(torch.ones(10_000_000).mul(2).sum())  # two tensors of 40 MB

def faults(before):
    for _ in range(before):  # until the heap has room for both wherever they come to lie
        step()
    begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        assert step() == 20_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun

torch.set_num_threads(1)
left = faults(1)
if not keep_freed():
    sys.exit("not glibc, or the user decides")
print(left, faults(20))
"""


def test_steps_do_not_fault_in_what_was_freed():
    """In a process of its own, as what is kept is kept for good; in a loop that runs already."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True)
    if done.returncode and "the user decides" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    left, kept = map(int, done.stdout.split())
    assert kept < 1_000
    assert left > 10_000  # else there is nothing to keep: drop the module


@pytest.mark.parametrize("name", allocator.SETTINGS)
def test_a_user_who_decides_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "1")
    assert not allocator.keep_freed()


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not allocator.keep_freed()
