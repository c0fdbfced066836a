"""What lies between the layers decides what their scores are, and so belongs to the key."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mpq import Scoring, to_float
from mpq.graph.fingerprint import fingerprint


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x))).mean((2, 3))


class Shift(nn.Module):
    def __init__(self, by: float) -> None:
        super().__init__()
        self.register_buffer("by", torch.tensor(by), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.by


def key(between: Callable[[Tensor], Tensor]) -> str:
    images = torch.zeros(2, 3, 8, 8)
    return Scoring().key(to_float(Between(between).eval(), images), images, None)


PAIRS = {
    "module": (nn.ReLU(), nn.Tanh()),
    "function": (torch.tanh, torch.sigmoid),
    "option of a module": (nn.LeakyReLU(0.1), nn.LeakyReLU(0.2)),
    "option of a function": (lambda x: x.clamp(0, 6), lambda x: x.clamp(0, 5)),
    "constant": (
        lambda x: x * torch.full((4, 1, 1), 2.0),
        lambda x: x * torch.full((4, 1, 1), 3.0),
    ),
    "buffer that is not saved": (Shift(0.1), Shift(0.2)),
}


@pytest.mark.parametrize("what", PAIRS)
def test_what_lies_between_layers_belongs_to_the_key(what: str) -> None:
    one, other = PAIRS[what]
    assert key(one) == key(one)
    assert key(one) != key(other)


def test_options_of_a_layer_belong_to_it() -> None:
    images = torch.zeros(2, 3, 8, 8)

    def of(**how: int) -> str:
        torch.manual_seed(0)
        return fingerprint(to_float(nn.Sequential(nn.Conv2d(3, 4, 3, **how)).eval(), images))

    assert of(padding=1) != of(padding=2)
    assert of(stride=2) != of(stride=3)


def test_scores_are_found_by_one_hash(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    from mpq.analyze import score
    from mpq.pipeline import scoring
    from mpq.rundir import Run

    counted: list[int] = []
    monkeypatch.setattr(score, "fingerprint", lambda qg: counted.append(1) or fingerprint(qg))
    monkeypatch.setattr(scoring.rundir, "RUNS", tmp_path)
    images = torch.rand(2, 3, 8, 8)
    graph = to_float(Between(torch.tanh).eval(), images)
    made, place = scoring.scores_of(graph, images, None, Scoring(), run=Run(tmp_path / "run"))
    assert place is None
    found, place = scoring.scores_of(graph, images, None, Scoring(), run=Run(tmp_path / "run"))
    assert place is not None
    assert found.to_json() == made.to_json()
    assert len(counted) == 2
