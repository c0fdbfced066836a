"""Lowering in stages: which width when, with which steps, and what is left at the end."""

from __future__ import annotations

import copy
from pathlib import Path

import nets
import numpy as np
import pytest
import torch

from mpq import absorb_norms, attach_norms, freeze, prepare, quantize_graph, to_float
from mpq.data import Normalization
from mpq.errors import UsageError
from mpq.numerics import fake_quantize
from mpq.policy import Policy
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.rundir import Run
from mpq.train.loop import fit
from mpq.train.plan import Hooks, TrainingData, TrainingPlan
from mpq.train.progressive import choose_steps, quantizers, stage, take_widths
from mpq.train.recipe import Recipe

NONE = Normalization.parse("none")
RECIPE = Recipe(epochs=5, batch=32, lr=0.01, flip=False, ema=0.5, progressive_epochs=4)


def student(weight: int = 4, activation: int = 4, *, wide: bool = True):
    images, policy = nets.images(16).sigmoid(), Policy.uniform(weight, activation)
    graph = prepare(to_float(nets.build("residual"), images[:2]), policy)
    if wide:
        take_widths(graph.module, 8)
    quantize_graph(graph, images)
    attach_norms(graph, images)
    return graph


def train(graph, folder: Path, recipe: Recipe = RECIPE, **options):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(96, 12, 12, 3), dtype=np.uint8)
    data = (images, np.arange(96, dtype=np.int64) % nets.CLASSES)
    hooks = options.pop("hooks", None)
    plan, run = TrainingPlan(recipe), Run(folder, **options)
    return fit(graph.module, TrainingData(data, data, NONE), plan, run, hooks)


def widths(graph) -> set[int]:
    """Of what the policy wants narrow; where 4-bit tensors are added, 8 bits stay."""
    return {q.spec.bits for q in quantizers(graph.module) if q.goal.bits < 8}


def test_stages_end_at_the_policys_widths():
    four, eight = student().module, student(8, 8).module
    assert [stage(four, e, 3) for e in range(5)] == [8, 6, 5, 4, 4]
    assert [stage(four, e, 1.5) for e in range(4)] == [8, 5, 4, 4]
    assert [stage(four, e, 0) for e in range(2)] == [4, 4]
    assert [stage(eight, e, 3) for e in range(4)] == [8, 8, 8, 8]


def test_a_network_of_16_bits_has_no_stages():
    model = student(16, 16, wide=False).module
    assert [stage(model, epoch, 4) for epoch in range(5)] == [16] * 5
    assert not take_widths(model, 16)


def test_only_what_the_policy_wants_narrow_is_widened():
    graph = student(4, 8, wide=False)
    before = {q: q.spec for q in quantizers(graph.module)}
    changed = take_widths(graph.module, 6)
    assert changed
    assert all(isinstance(q, QuantLayer) and q.spec.bits == 6 for q in changed)
    assert all(q.spec == spec for q, spec in before.items() if q not in changed)
    assert take_widths(graph.module, 6) == []
    assert set(take_widths(graph.module, 4)) == set(changed)
    assert {q: q.spec for q in quantizers(graph.module)} == before


def test_steps_are_chosen_for_the_new_width():
    graph, images = student(), nets.images(16).sigmoid()
    with torch.no_grad():
        expected = graph.module.eval()(images)
    scales = {q: q.scale.detach().clone() for q in quantizers(graph.module)}
    changed = take_widths(graph.module, 4)
    with torch.no_grad():
        stale = (graph.module(images) - expected).square().mean()
        choose_steps(graph.module, changed, images)
        assert (graph.module(images) - expected).square().mean() < 0.2 * stale
    for q in changed:
        ratio = q.scale / scales[q]
        assert bool((ratio > 2).all())
        assert bool((ratio <= 255 / 15 * 1.2).all())
    layer = next(q for q in changed if isinstance(q, QuantLayer))
    zero = torch.zeros_like(layer.scale)

    def error(scale):
        return (fake_quantize(layer.weight, scale, zero, layer.spec) - layer.weight).square().sum()

    assert all(error(layer.scale) <= error(layer.scale * r) * 1.01 for r in (0.8, 0.9, 1.1, 1.2))


def test_choosing_steps_moves_nothing_else():
    graph = student()
    module = graph.module.train()
    changed = take_widths(module, 5)
    before = copy.deepcopy(module.state_dict())
    choose_steps(module, changed, nets.images(16).sigmoid())
    kinds = (".scale", ".zero_point")
    moved = [k for k, v in module.state_dict().items() if not torch.equal(v, before[k])]
    assert moved
    assert all(k.endswith(kinds) for k in moved)
    assert all(m.training for m in module.modules())


def test_a_run_lowers_and_what_it_leaves_has_the_policys_widths(tmp_path: Path):
    graph, seen = student(), []
    result = train(graph, tmp_path, hooks=Hooks(on_epoch=lambda r: seen.append(widths(graph))))
    assert seen == [{8}, {8}, {6}, {5}, {4}]
    assert all(q.spec == q.goal for q in quantizers(graph.module))
    assert len(result.history) == 5
    images = nets.images(8).sigmoid()
    with torch.no_grad():
        trained = graph.module(images)
        absorb_norms(graph)
        assert torch.equal(freeze(graph).module(images), trained)
    layers = [m for m in graph.module.modules() if isinstance(m, QuantLayer)]
    assert max(int(layer.integers().abs().max()) for layer in layers) <= 8
    sites = [m for m in graph.module.modules() if isinstance(m, FakeQuant)]
    assert {s.spec.qmax for s in sites if s.goal.bits == 4} == {15}


@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, epoch: int):
    whole, broken, fresh = student(), student(), student()
    expected = train(whole, tmp_path / "whole")

    def stop(at: int, step: int, steps: int, loss: float) -> None:
        if (at, step) == (epoch, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, tmp_path / "r", hooks=Hooks(on_step=stop))
    found = train(fresh, tmp_path / "r", resume=True)
    for (name, x), y in zip(
        whole.module.state_dict().items(), fresh.module.state_dict().values(), strict=True
    ):
        assert torch.equal(x, y), name
    assert [r["val_top1"] for r in expected.history] == [r["val_top1"] for r in found.history]
    again = student()
    train(again, tmp_path / "r", resume=True)
    assert widths(again) == {4}


def test_a_graph_at_its_widths_begins_at_8_bits_too(tmp_path: Path):
    graph, seen = student(wide=False), []
    train(graph, tmp_path, hooks=Hooks(on_epoch=lambda r: seen.append(widths(graph))))
    assert (seen[0], seen[-1]) == ({8}, {4})


def test_the_last_epoch_must_have_the_policys_widths():
    with pytest.raises(UsageError, match=r"progressive_epochs must be at most 4.* Got 4\.5"):
        RECIPE.override({"progressive_epochs": 4.5})
