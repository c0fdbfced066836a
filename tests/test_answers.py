"""Kept teachers' answers: the same run, without asking again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_loop import BASE, NORMALIZE, STRONG, assert_equal_weights, network, train
from torch import Tensor, nn

from mpq.errors import CheckpointError
from mpq.train.ensemble import Ensemble, Member


class Counting(nn.Module):
    """A teacher that counts how often it is asked."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network, self.asked = network(seed).eval(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.asked += 1
        return self.network(x)


def teachers(*seeds: int) -> tuple[Ensemble, list[Counting]]:
    modules = [Counting(s) for s in seeds]
    members = [Member(f"t{s}", m, NORMALIZE) for s, m in zip(seeds, modules, strict=True)]
    return Ensemble(members), modules


@pytest.mark.parametrize("recipe", [BASE, STRONG], ids=["plain", "strong"])
def test_a_run_with_kept_answers_is_the_same_run(tmp_path: Path, recipe):
    plain, kept, again = network(), network(), network()
    train(plain, tmp_path / "plain", recipe, teacher=teachers(1, 2)[0])
    train(kept, tmp_path / "kept", recipe, teacher=teachers(1, 2)[0], answers=tmp_path / "a")
    ensemble, modules = teachers(1, 2)
    train(again, tmp_path / "again", recipe, teacher=ensemble, answers=tmp_path / "a")
    assert_equal_weights(plain, kept)
    assert_equal_weights(plain, again)
    assert [m.asked for m in modules] == [0, 0]


def test_ensembles_share_the_answers_of_a_member(tmp_path: Path):
    train(network(), tmp_path / "one", teacher=teachers(1)[0], answers=tmp_path / "a")
    ensemble, (first, second) = teachers(1, 2)
    shared, plain = network(), network()
    train(shared, tmp_path / "two", teacher=ensemble, answers=tmp_path / "a")
    train(plain, tmp_path / "plain", teacher=teachers(1, 2)[0])
    assert (first.asked, second.asked > 0) == (0, True)
    assert_equal_weights(shared, plain)


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"recipe": BASE.override({"crop": 0.25})},
        {"recipe": BASE.override({"batch": 16})},
        {"recipe": BASE.override({"rand_operations": 1})},
    ],
    ids=["seed", "augmentation", "batch", "randaugment"],
)
def test_other_images_are_asked_about_anew(tmp_path: Path, other):
    train(network(), tmp_path / "one", teacher=teachers(1)[0], answers=tmp_path / "a")
    ensemble, (module,) = teachers(1)
    train(network(), tmp_path / "two", teacher=ensemble, answers=tmp_path / "a", **other)
    assert module.asked > 0


def test_what_only_the_student_sees_does_not_count(tmp_path: Path):
    train(network(), tmp_path / "one", teacher=teachers(1)[0], answers=tmp_path / "a")
    ensemble, (module,) = teachers(1)
    recipe = BASE.override({"lr": 0.01, "temperature": 4, "distill": "dkd", "weighting": "vote"})
    train(network(), tmp_path / "two", recipe, teacher=ensemble, answers=tmp_path / "a")
    assert module.asked == 0


def test_a_foreign_or_short_file_is_refused(tmp_path: Path):
    train(network(), tmp_path / "one", teacher=teachers(1)[0], answers=tmp_path / "a")
    (file, *_) = sorted((tmp_path / "a").rglob("epoch-0000.pth"))
    content = torch.load(file, weights_only=True)
    torch.save({**content, "logits": content["logits"][:-1]}, file)
    with pytest.raises(CheckpointError, match="must answer a whole epoch"):
        train(network(), tmp_path / "two", teacher=teachers(1)[0], answers=tmp_path / "a")
    torch.save({"format": "other"}, file)
    with pytest.raises(CheckpointError, match="must hold a teacher's answers as mpq writes them"):
        train(network(), tmp_path / "three", teacher=teachers(1)[0], answers=tmp_path / "a")


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path: Path, caplog):
    (tmp_path / "a").write_text("a file where a folder should be")
    train(network(), tmp_path / "one", teacher=teachers(1)[0], answers=tmp_path / "a")
    assert "are not kept" in caplog.text


def test_a_cycle_repeats_the_images_and_the_teachers_answer_once(tmp_path: Path):
    ensemble, (module,) = teachers(1)
    recipe = BASE.override({"cycle": 1, "epochs": 3})
    kept, plain = network(), network()
    train(kept, tmp_path / "kept", recipe, teacher=ensemble, answers=tmp_path / "a")
    train(plain, tmp_path / "plain", recipe, teacher=teachers(1)[0])
    assert_equal_weights(kept, plain)
    once, (other,) = teachers(1)
    short = recipe.override({"epochs": 1})
    train(network(), tmp_path / "once", short, teacher=once, answers=tmp_path / "b")
    assert module.asked == other.asked
    assert len(list((tmp_path / "a").rglob("*.pth"))) == 1
