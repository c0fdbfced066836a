"""Several processes: they train as one does, one of them leads, and all of them end in order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import main, score

from mpq.processes import leading, ranks_of

HERE = Path(__file__).parent
ACCELERATE = (
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
    "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
    "--main_process_port", "0",
)  # fmt: skip


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(
    *command: str, folder: Path, by: tuple[str, ...] = ACCELERATE
) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.run(
        [*by, *command], capture_output=True, text=True, env=env, cwd=folder, timeout=300
    )


def test_gradients_and_scores_of_two_processes_are_those_of_one(tmp_path: Path):
    """One launch for both: most of the time is spent on starting."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    done = launch(str(HERE / "processes.py"), str(both), folder=tmp_path, by=TORCHRUN)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "terminate called" not in done.stderr
    assert sorted(p.name for p in both.glob("left*")) == ["left0", "left1"]
    main(alone)
    found, expected = (torch.load(p / "weights.pth", weights_only=True) for p in (both, alone))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=1e-5)
    told, wanted = ((p / "metrics.jsonl").read_text().splitlines() for p in (both, alone))
    for line, other in zip(told, wanted, strict=True):
        ours, theirs = json.loads(line), json.loads(other)
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert ours["train_top1"] == theirs["train_top1"]
    score(alone)
    scores = [json.loads((both / f"scores{rank}.json").read_text()) for rank in (0, 1)]
    whole = json.loads((alone / "scores0.json").read_text())
    assert [one["scores"] for one in scores] == [whole["scores"]] * 2
    assert [one["batches"] for one in scores] == [14, 10]  # batches 0 and 2; 1 and 3


def test_the_command_line_runs_in_two_processes_and_writes_once(tmp_path: Path):
    train = ("train", "resnet8", "--data", "digits", "--epochs", "1", "--set", "batch=512")
    done = launch("-m", "mpq", *train, "-o", "model.pth", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "model.pth").is_file()
    assert done.stderr.count("wrote model.pth") == 1
    assert done.stdout.count("held-out images") == 1
    assert [p.name for p in (tmp_path / "model.train").iterdir()] == ["metrics.jsonl"]


def test_one_process_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert leading()
    assert ranks_of() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert not leading()
