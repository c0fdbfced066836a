"""Several processes: who leads, and that all of them end in order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpq.processes import leading, ranks_of

PROGRAM = """
from mpq.analyze.batches import gather
from mpq.processes import leading, ranks_of
rank, ranks = ranks_of()
assert leading() == (rank == 0)
assert gather({{rank: rank}}) == {{0: 0, 1: 1}}
open({folder!r} + "/seen%d" % rank, "w").close()
"""


def test_one_process_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert leading()
    assert ranks_of() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert not leading()


@pytest.mark.parametrize("attempt", range(3))
def test_processes_end_without_an_abort(attempt: int, tmp_path: Path) -> None:
    """Without `leave_at_exit` five of six such runs end in SIGABRT, after all their work."""
    program = tmp_path / "part.py"
    program.write_text(PROGRAM.format(folder=str(tmp_path)))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run += ["--nproc-per-node", "2", str(program)]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr
    assert sorted(p.name for p in tmp_path.glob("seen*")) == ["seen0", "seen1"]
