"""Attention transfer: where maps come from, how far apart they are, and a run that uses them."""

from __future__ import annotations

import json
from pathlib import Path

import nets
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from mpq import attach_norms, policies, prepare, quantize_graph, to_float, zoo
from mpq.cli.train import train as train_command
from mpq.data import Normalization
from mpq.errors import UsageError
from mpq.graph.lean import lean
from mpq.train.ensemble import Ensemble, Member
from mpq.train.features import attention_distance, find_stages
from mpq.train.loop import fit
from mpq.train.objective import Objective
from mpq.train.recipe import Recipe

NONE = Normalization.parse("none")
RECIPE = Recipe(epochs=3, batch=32, lr=0.02, flip=False, feature_weight=1.0)


class Gated(nn.Module):
    """Two sizes, one ReLU for both, and a gate that pools to one pixel and back."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1, stride=2)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.first(x))
        x = self.relu(self.second(x))
        x = x * self.gate(self.pool(x)).sigmoid()
        return self.fc(x.mean((2, 3)))


def network(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return Gated(width)


def teachers() -> Ensemble:
    return Ensemble([Member(f"t{i}", network(i + 1, 6), NONE) for i in range(2)])


def pictures() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(96, 12, 12, 3), dtype=np.uint8)
    return images, np.arange(96, dtype=np.int64) % nets.CLASSES


def train(model: nn.Module, folder: Path, recipe: Recipe = RECIPE, **options):
    options = {"teacher": teachers(), **options}
    data = {"train": pictures(), "validation": None, "normalize": NONE}
    return fit(model, recipe=recipe, folder=folder, **data, **options)


# Stages


def test_stages_are_the_last_maps_of_each_size():
    model = zoo.build("resnet20", 10).train()
    images = torch.randn(2, 3, 32, 32)
    stages = find_stages(model, lambda: model(images), "it")
    assert list(stages.modules) == [(32, 32), (16, 16), (8, 8)]
    assert model.training
    found: dict[nn.Module, Tensor] = {}
    for module in stages.modules.values():
        module.register_forward_hook(lambda m, i, out: found.update({m: out}))
    with stages.watch() as maps:
        model(images)
    for seen, module in zip(maps, stages.modules.values(), strict=True):
        torch.testing.assert_close(seen, found[module].square().mean(1))
    assert [m.shape[1] for m in found.values()] == [16, 32, 64]


def test_a_shared_module_and_a_gate_do_not_confuse_the_stages():
    model, images = network(0), nets.images(2)
    sides = images.shape[2]
    stages = find_stages(model, lambda: model(images), "it")
    assert list(stages.modules) == [(sides, sides), (sides // 2, sides // 2)]
    assert set(stages.modules.values()) == {model.relu}
    with stages.watch() as maps:
        model(images)
    assert [m.shape[1] for m in maps] == [sides, sides // 2]
    assert not any(m._forward_hooks for m in model.modules())


def test_a_prepared_network_has_the_stages_of_its_float_one():
    images = nets.images(4)
    graph = prepare(to_float(network(0).eval(), images[:2]), policies.load("w4a8"))
    quantize_graph(graph, images)
    attach_norms(graph, images)
    step = lean(graph.module).train()
    stages = find_stages(step, lambda: step(images), "it")
    plain = network(0)
    assert list(stages.modules) == list(find_stages(plain, lambda: plain(images), "it").modules)
    with stages.watch() as maps:
        step(images)
    sum(m.sum() for m in maps).backward()
    assert all(q.grad is not None for n, q in step.named_parameters() if n.startswith("first."))


def test_a_network_without_maps_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 2))
    with pytest.raises(UsageError, match=r"needs networks with feature maps .* Got teacher x"):
        find_stages(model, lambda: model(torch.zeros(2, 3, 4, 4)), "teacher x")
    assert not any(m._forward_hooks for m in model.modules())


# The distance


def maps(*sides: int, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    return [torch.rand(3, side, side) for side in sides]


def test_the_distance_is_the_formula():
    ours, theirs = maps(4, 2), maps(4, 2, seed=1)
    expected = torch.zeros(3)
    for a, b in zip(ours, theirs, strict=True):
        a, b = a.flatten(1), b.flatten(1)
        a, b = a / a.norm(dim=1, keepdim=True), b / b.norm(dim=1, keepdim=True)
        expected += (a - b).square().sum(1) / 2
    torch.testing.assert_close(attention_distance(ours, theirs), expected)


def test_scale_does_not_count_and_nothing_is_further_than_two():
    ours = maps(4, 2)
    assert attention_distance(ours, [7 * m for m in ours]).max() < 1e-6
    left, right = torch.zeros(1, 2, 2), torch.zeros(1, 2, 2)
    left[0, 0, 0] = right[0, 1, 1] = 3.0
    assert attention_distance([left], [right]).item() == pytest.approx(2.0)


def test_stages_are_paired_from_the_last_and_pooled_to_the_smaller():
    coarse = maps(4)[0]
    fine = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert attention_distance([fine], [*maps(9, seed=3), coarse]).max() < 1e-6
    assert attention_distance([coarse], [fine]).max() < 1e-6
    assert attention_distance([fine], [coarse, *maps(9, seed=3)]).min() > 1e-3


def test_dead_maps_have_a_finite_gradient():
    dead = torch.zeros(2, 4, 4, requires_grad=True)
    attention_distance([dead], maps(4)[:1][0][:2].unsqueeze(0)).sum().backward()
    assert torch.isfinite(dead.grad).all()


# The loss and the run


def test_teachers_count_with_their_weights():
    def second(teachers, student, labels, progress):
        return torch.tensor([0.0, 1.0]).view(2, 1).expand(2, student.shape[0])

    objective = Objective(RECIPE.override({"feature_weight": 3.0}), second)
    student, answers, labels = torch.randn(4, 5), torch.randn(2, 4, 5), torch.arange(4)
    distances = torch.rand(2, 4)
    bare = objective(student, answers, labels, progress=0.5)
    parts = objective(student, answers, labels, progress=0.5, features=distances)
    assert bare.feature is None
    torch.testing.assert_close(parts.feature, distances[1].mean())
    torch.testing.assert_close(parts.loss, bare.loss + 3 * distances[1].mean())


def test_the_student_comes_to_look_where_its_teachers_look(tmp_path):
    only = {"distill_weight": 0, "label_weight": 1e-6, "feature_weight": 10.0}
    recipe = RECIPE.override({"epochs": 16, "lr": 0.1, **only})
    guide = Ensemble([Member("t", network(1, 6), NONE)])
    found = train(network(0), tmp_path, recipe, teacher=guide).history
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["train_feature_loss"] == found[-1]["train_feature_loss"]
    assert found[-1]["train_feature_loss"] < 0.7 * found[0]["train_feature_loss"]


def test_an_interrupted_run_ends_the_same(tmp_path):
    whole, resumed = network(0), network(0)
    train(whole, tmp_path / "whole")

    def stop(record):
        if record["epoch"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(resumed, tmp_path / "parts", on_epoch=stop)
    resumed = network(5)
    train(resumed, tmp_path / "parts", resume=True)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def test_a_prepared_network_learns_from_features(tmp_path):
    images = nets.images(16)
    graph = prepare(to_float(network(0).eval(), images[:2]), policies.load("w4a8"))
    quantize_graph(graph, images)
    attach_norms(graph, images)
    recipe = RECIPE.override({"epochs": 1, "precision": "bf16", "accumulate": 2, "ema": 0.9})
    record = train(graph.module, tmp_path, recipe).history[0]
    assert 0 < record["train_feature_loss"] < 2
    expected = 0.1 * record["train_label_loss"] + 0.9 * record["train_distill_loss"]
    total = expected + record["train_feature_loss"]
    assert record["train_loss"] == pytest.approx(total, rel=1e-4)


def test_kept_answers_are_refused_before_anything_is_written(tmp_path, monkeypatch):
    message = r"feature_weight must be 0 with --keep-answers: .* Got 1\. Leave one"
    with pytest.raises(UsageError, match=message):
        train(network(0), tmp_path / "run", answers=tmp_path / "answers")
    monkeypatch.chdir(tmp_path)
    flags = ["--teacher", "t.pth", "--keep-answers", "kept", "--set", "feature_weight=1"]
    done = CliRunner().invoke(train_command, ["resnet20", "--data", "digits", *flags])
    assert isinstance(done.exception, UsageError)
    assert not list(tmp_path.iterdir())


def test_features_and_the_compiler_exclude_each_other():
    with pytest.raises(UsageError, match="feature_weight and compile cannot both be on"):
        RECIPE.override({"compile": True})
