"""Several processes: they train as one does, one of them leads, and all of them end in order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import score, train

from mpq.processes import leading, ranks_of


def test_gradients_and_scores_of_two_processes_are_those_of_one(
    two_processes: Path, tmp_path: Path
):
    both, alone = two_processes, tmp_path / "alone"
    assert "terminate called" not in (both / "stderr.txt").read_text()
    assert sorted(p.name for p in both.glob("left*")) == ["left0", "left1"]
    train(alone)
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


def test_the_command_line_runs_in_two_processes_and_writes_once(two_processes: Path):
    assert (two_processes / "model.pth").is_file()
    assert (two_processes / "stderr.txt").read_text().count("wrote model.pth") == 1
    assert (two_processes / "stdout.txt").read_text().count("held-out images") == 1
    assert [p.name for p in (two_processes / "model.train").iterdir()] == ["metrics.jsonl"]


def test_one_process_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert leading()
    assert ranks_of() == (0, 1)
    monkeypatch.setenv("RANK", "1")
    assert not leading()
