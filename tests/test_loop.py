from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from mpq.cpu import Cpu
from mpq.data import Normalization
from mpq.errors import DataError, TrainError, UsageError
from mpq.nonfinite import first_nonfinite
from mpq.rundir import Run
from mpq.train.bf16 import autocast
from mpq.train.ensemble import Ensemble, Member
from mpq.train.evaluate import accuracy, predict
from mpq.train.loop import fit
from mpq.train.optim import Ema, learning_rate, parameter_groups
from mpq.train.plan import Hooks, TrainingData, TrainingPlan
from mpq.train.recipe import Recipe

NORMALIZE = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
BASE = Recipe(epochs=3, batch=32, lr=0.05, flip=False)
STRONG = BASE.override(
    {"trivial": True, "erase": 0.3, "mixup": 0.3, "cutmix": 1.0, "ema": 0.9, "smoothing": 0.1}
)


class Step(nn.Module):
    """Stands for a quantizer: multiplies by a learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


def network(seed: int = 0, classes: int = 4) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Step(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(32, classes),
    )


def pictures(count: int = 160, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A bright quadrant on noise; its place is the class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % 4
    images = rng.integers(0, 120, size=(count, 8, 8, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        y, x = 4 * (label // 2), 4 * (label % 2)
        image[y : y + 4, x : x + 4] += 100
    return images, labels


DATA = TrainingData(pictures(), pictures(80, seed=1), NORMALIZE)


def train(model, folder, recipe=BASE, *, data=DATA, hooks=None, **options):
    """A run; `options` are those of the plan and of what stages share."""
    chosen = {k: options.pop(k) for k in ("teacher", "weighting", "answers") if k in options}
    return fit(model, data, TrainingPlan(recipe, **chosen), Run(folder, **options), hooks)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y), name


# Training


@pytest.mark.parametrize("optimizer", [{"optimizer": "sgd"}, {"optimizer": "adamw", "lr": 0.01}])
def test_it_learns(tmp_path, optimizer):
    model = network()
    result = train(model, tmp_path, BASE.override({"epochs": 12, "crop": 0, **optimizer}))
    assert result.top1 > 95
    assert result.top1 == accuracy(model, *pictures(80, seed=1), NORMALIZE)
    assert not model.training


def test_records_are_complete_and_on_disk(tmp_path):
    steps, records = [], []
    hooks = Hooks(on_step=lambda *a: steps.append(a), on_epoch=records.append)
    result = train(network(), tmp_path, hooks=hooks)
    assert records == result.history == lines(tmp_path)
    keys = ["epoch", "lr", "train_loss", "train_label_loss", "train_top1", "val_top1", "seconds"]
    assert all(list(r) == keys for r in records)
    assert [r["epoch"] for r in records] == [0, 1, 2]
    assert [s[:3] for s in steps] == [(e, s, 5) for e in range(3) for s in range(5)]
    assert records[0]["train_loss"] == pytest.approx(np.mean([s[3] for s in steps[:5]]), rel=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pth", "metrics.jsonl"]


def test_a_seed_decides_everything(tmp_path):
    a, b, c = network(), network(), network()
    train(a, tmp_path / "a", STRONG, seed=3)
    torch.manual_seed(99)
    np.random.seed(99)
    train(b, tmp_path / "b", STRONG, seed=3)
    train(c, tmp_path / "c", STRONG, seed=4)
    assert_equal_weights(a, b)
    assert not torch.equal(a[0].weight, c[0].weight)


def test_the_callers_random_state_is_left_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    model = network()
    torch.manual_seed(5)
    train(model, tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_accumulation_changes_memory_not_the_result(tmp_path):
    # Without batch statistics and dropout, parts of a batch add up to the batch.
    def plain() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))

    a, b = plain(), plain()
    recipe = BASE.override({"crop": 0, "epochs": 2})
    train(a, tmp_path / "a", recipe)
    train(b, tmp_path / "b", recipe.override({"accumulate": 4}))
    torch.testing.assert_close(a[1].weight, b[1].weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"channels_last": True}])
def test_other_arithmetic_and_layout_learn_too(tmp_path, options):
    result = train(network(), tmp_path, BASE.override({"epochs": 12, "crop": 0, **options}))
    assert result.top1 > 90


@pytest.mark.parametrize("stride", [1, 2])
def test_only_strided_depthwise_layers_stay_in_float32_under_bf16(stride):
    torch.manual_seed(0)
    layer, images = nn.Conv2d(8, 8, 3, stride, 1, groups=8), torch.randn(2, 8, 6, 6)
    with autocast("cpu", enabled=True):
        found = [layer(images), functional.conv2d(images, layer.weight, stride=stride, groups=8)]
    assert {f.dtype for f in found} == {torch.bfloat16}
    found[0].float().square().sum().backward()
    assert torch.equal(found[0], layer(images).bfloat16()) == (stride == 2)
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("flags", [{"avx2"}, {"avx512_bf16"}, set()])
def test_bf16_on_a_cpu_without_it_is_said_aloud(tmp_path, monkeypatch, caplog, flags):
    cpu = Cpu("A CPU", frozenset(flags), x86=True)
    monkeypatch.setattr("mpq.train.engine.this_cpu", lambda: cpu)
    train(network(), tmp_path, BASE.override({"epochs": 1, "precision": "bf16"}))
    assert ("precision=float32" in caplog.text) == (flags == {"avx2"})


def test_read_only_arrays_are_fine(tmp_path):
    images, labels = pictures()
    images.setflags(write=False)
    labels.setflags(write=False)
    data = TrainingData((images, labels), None, NORMALIZE)
    result = train(network(), tmp_path, BASE.override({"epochs": 1}), data=data)
    assert result.top1 is None


# Teachers


def teacher(classes: int = 4) -> Ensemble:
    members = [Member(f"t{i}", network(i + 1, classes), NORMALIZE) for i in range(2)]
    return Ensemble(members)


@pytest.mark.parametrize("loss", ["kd", "standardized", "dkd", "dist"])
def test_distillation_is_recorded_with_the_members_weights(tmp_path, loss):
    recipe = STRONG.override({"distill": loss, "weighting": "dynamic", "epochs": 1})
    result = train(network(), tmp_path, recipe, teacher=teacher())
    record = result.history[0]
    assert record["train_distill_loss"] > 0
    assert sum(record["teacher_weights"]) == pytest.approx(1)
    expected = 0.1 * record["train_label_loss"] + 0.9 * record["train_distill_loss"]
    assert record["train_loss"] == pytest.approx(expected, rel=1e-4)


def test_a_student_can_learn_without_labels(tmp_path):
    guide = network(1)
    train(guide, tmp_path / "t", BASE.override({"epochs": 12, "crop": 0}))
    recipe = BASE.override({"epochs": 12, "crop": 0, "label_weight": 0, "distill_weight": 1})
    ensemble = Ensemble([Member("t", guide, NORMALIZE)])
    assert train(network(), tmp_path / "s", recipe, teacher=ensemble).top1 > 90


@pytest.mark.parametrize("loss", ["kd", "standardized", "dkd", "dist"])
def test_images_without_labels_are_learned_from_the_teacher(tmp_path, loss):
    guide = network(1)
    train(guide, tmp_path / "t", BASE.override({"epochs": 12, "crop": 0}))
    images, labels = pictures()
    labels[16:] = -1
    recipe = BASE.override({"epochs": 12, "crop": 0, "distill": loss, "weighting": "dynamic"})
    data = replace(DATA, train=(images, labels))
    ensemble = Ensemble([Member("t", guide, NORMALIZE)])
    found = train(network(), tmp_path / "s", recipe, data=data, teacher=ensemble)
    assert found.top1 > 90
    assert found.history[-1]["train_top1"] * 16 / 100 % 1 == 0  # of those with a label
    with pytest.raises(DataError, match="smallest -1"):
        train(network(), tmp_path / "none", recipe, data=data)


def test_without_any_label_only_the_teacher_speaks(tmp_path):
    images, labels = pictures()
    recipe = BASE.override({"epochs": 1, "mixup": 0.4, "smoothing": 0.1})
    bare = TrainingData((images, np.full_like(labels, -1)), None, NORMALIZE)
    found = train(network(), tmp_path / "a", recipe, data=bare, teacher=teacher())
    assert found.history[0]["train_top1"] is None
    assert found.history[0]["train_label_loss"] == 0
    weights = recipe.override({"label_weight": 0.0})
    data = replace(bare, train=(images, labels))
    alike = train(network(), tmp_path / "b", weights, data=data, teacher=teacher())
    distill = "train_distill_loss"
    assert found.history[0][distill] == pytest.approx(alike.history[0][distill], rel=1e-5)


def test_a_callable_replaces_the_recipes_weighting(tmp_path):
    def only_second(teachers, student, labels, progress):
        return torch.tensor([0.0, 1.0]).view(2, 1).expand(2, student.shape[0])

    recipe = BASE.override({"epochs": 1})
    result = train(network(), tmp_path, recipe, teacher=teacher(), weighting=only_second)
    assert result.history[0]["teacher_weights"] == [0.0, 1.0]


def test_distillation_warm_up_starts_from_the_labels(tmp_path):
    recipe = BASE.override({"distill_warmup_epochs": 1e6, "label_weight": 1.0, "epochs": 1})
    record = train(network(), tmp_path, recipe, teacher=teacher()).history[0]
    assert record["train_loss"] == pytest.approx(record["train_label_loss"], abs=1e-4)


# Interruption


class Interrupt:
    """Raises KeyboardInterrupt at one step."""

    def __init__(self, epoch: int, step: int) -> None:
        self.at = (epoch, step)

    def __call__(self, epoch, step, steps, loss):
        if (epoch, step) == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", [(0, 2), (1, 0), (2, 4)])
def test_a_resumed_run_is_bit_equal(tmp_path, at):
    whole, broken = network(), network()
    expected = train(whole, tmp_path / "whole", STRONG, teacher=teacher())
    hooks = Hooks(on_step=Interrupt(*at))
    with pytest.raises(KeyboardInterrupt):
        train(broken, tmp_path / "r", STRONG, teacher=teacher(), hooks=hooks)
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["checkpoint.pth", "metrics.jsonl"]
    assert len(lines(tmp_path / "r")) == at[0]

    fresh = network(seed=42)  # everything must come from the folder
    resumed = train(fresh, tmp_path / "r", STRONG, teacher=teacher(), resume=True)
    assert_equal_weights(whole, fresh)
    for a, b in zip(expected.history, resumed.history, strict=True):
        assert {**a, "seconds": 0} == {**b, "seconds": 0}
    assert lines(tmp_path / "r") == resumed.history


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    first, second = network(), network(seed=42)
    a = train(first, tmp_path, STRONG)
    hooks = Hooks(on_epoch=lambda r: pytest.fail("trained"))
    b = train(second, tmp_path, STRONG, resume=True, hooks=hooks)
    assert replace(b, start=a.start) == a  # each began with a network of its own
    assert_equal_weights(first, second)


def test_resume_without_a_checkpoint_starts(tmp_path):
    assert len(train(network(), tmp_path / "new", resume=True).history) == 3


def test_without_resume_a_folder_is_begun_anew(tmp_path):
    a, b = network(), network()
    train(a, tmp_path)
    train(b, tmp_path)
    assert_equal_weights(a, b)
    assert len(lines(tmp_path)) == 3


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (BASE.override({"lr": 0.06}), {}, r"recipe\.lr was 0\.05, is 0\.06"),
        (BASE, {"seed": 1}, r"seed was 0, is 1"),
        (BASE, {"teacher": True}, r"teacher was \[\], is \['t0', 't1'\]"),
        (BASE, {"model": True}, r"model was .*, is "),
    ],
)
def test_another_run_is_not_resumed(tmp_path, recipe, options, message):
    train(network(), tmp_path)
    before = (tmp_path / "checkpoint.pth").read_bytes()
    options = {k: v for k, v in options.items() if k != "model"} | {"resume": True}
    if "teacher" in options:
        options["teacher"] = teacher()
    model = network(classes=6) if "model" in message else network()
    with pytest.raises(TrainError, match=message):
        train(model, tmp_path, recipe, **options)
    assert (tmp_path / "checkpoint.pth").read_bytes() == before


def test_a_run_from_before_a_key_came_or_went_is_resumed(tmp_path):
    train(network(), tmp_path, BASE.override({"checkpoint_every": 1}))
    content = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    recipe = content["identity"]["recipe"]
    del recipe["dampen"]
    recipe["feature_weight"] = 0.0
    torch.save(content, tmp_path / "checkpoint.pth")
    train(network(), tmp_path, resume=True)
    with pytest.raises(TrainError, match=r"recipe\.dampen was 0\.0, is 1\.0"):
        train(network(), tmp_path, BASE.override({"dampen": 1.0}), resume=True)


def test_a_foreign_checkpoint_is_not_resumed(tmp_path):
    torch.save({"state": {}}, tmp_path / "checkpoint.pth")
    with pytest.raises(TrainError, match=r"must be a training checkpoint"):
        train(network(), tmp_path, resume=True)


# Numbers that are none


class Root(nn.Module):
    def forward(self, x):
        return x.sqrt()


def test_a_nan_names_the_module(tmp_path):
    model = network()
    model[2] = Root()  # negative inputs
    with pytest.raises(
        TrainError, match=r"epoch 0, step 0.*: 2 \(Root\): its input and parameters"
    ):
        train(model, tmp_path)


def test_a_broken_weight_is_named(tmp_path):
    model = network()
    with torch.no_grad():
        model[7].bias[0] = float("inf")
    with pytest.raises(TrainError, match=r"7 \(Linear\): its bias became non-finite"):
        train(model, tmp_path)


def test_a_broken_teacher_is_named(tmp_path):
    bad = network(1)
    with torch.no_grad():
        bad[7].weight[0, 0] = float("nan")
    ensemble = Ensemble([Member("good", network(2), NORMALIZE), Member("bad", bad, NORMALIZE)])
    with pytest.raises(TrainError, match=r"teacher networks\.1\.7 \(Linear\): its weight"):
        train(network(), tmp_path, teacher=ensemble)


def assert_first_epoch_is_kept(folder):
    saved = torch.load(folder / "checkpoint.pth", weights_only=True)
    assert saved["epoch"] == len(lines(folder)) == 1
    assert all(v.isfinite().all() for v in saved["model"].values())


def test_divergence_keeps_the_last_good_epoch(tmp_path):
    class Fuse(nn.Module):
        """Breaks in the second epoch."""

        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x):
            self.calls += self.training
            return x * float("nan") if self.calls > 7 else x

    model = nn.Sequential(network(), Fuse())
    with pytest.raises(TrainError, match=r"epoch 1, step 2.*: 1 \(Fuse\).*last finished epoch"):
        train(model, tmp_path)
    assert_first_epoch_is_kept(tmp_path)


def test_weights_that_break_in_the_last_step_of_an_epoch_replace_none(tmp_path):
    class Late(nn.Module):
        """A gradient of NaN in the last step of the second epoch, of a finite loss."""

        calls = 0

        def forward(self, x):
            self.calls += self.training
            if x.requires_grad and self.calls == 10:
                x.register_hook(lambda grad: grad * float("nan"))
            return x

    model = nn.Sequential(network(), Late())
    with pytest.raises(TrainError, match=r"became non-finite in the last steps of epoch 1"):
        train(model, tmp_path)
    assert_first_epoch_is_kept(tmp_path)


def test_a_classifier_may_name_its_only_answer(tmp_path):
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x):
            return {"logits": self.net(x)}

    named, plain = Named(), network()
    train(named, tmp_path / "a")
    train(plain, tmp_path / "b")
    assert_equal_weights(named.net, plain)


def test_first_nonfinite_is_none_for_a_sound_model():
    model = network()
    modules = dict(model.named_modules())
    assert first_nonfinite(modules, lambda: model(torch.rand(2, 3, 8, 8))) is None
    assert not any(m._forward_hooks for m in model.modules())


# Refusals


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 8, 8, 3)), np.zeros(4, np.int64), r"must be uint8 .* float64"),
        (np.zeros((4, 3, 8), np.uint8), np.zeros(4, np.int64), r"\[4, 3, 8\]"),
        (np.zeros((4, 3, 8, 8), np.uint8), np.zeros(4, np.int64), r"3 channels.*\[4, 3, 8, 8\]"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64), r"at least one image"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, np.int64), r"must be 4 class ids.*\[3\]"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.full(4, -1), r"smallest -1"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.full(4, 7), r"C >= 8.* Got \[4, 4\]"),
    ],
)
def test_bad_data_is_refused(tmp_path, images, labels, message):
    with pytest.raises(DataError, match=message):
        train(network(), tmp_path, data=TrainingData((images, labels), None, NORMALIZE))


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"teachers must give logits .*\[32, 4\]\. Got \[32, 6\]"):
        train(network(), tmp_path, teacher=teacher(classes=6))


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"device must be cpu.* Got 'tpu'"):
        train(network(), tmp_path, device="tpu")


# Parts


def test_parameter_groups():
    recipe = Recipe(weight_decay=0.1, step_lr=0.5)
    model = network()
    model[7].bias.requires_grad_(False)
    weights, plain, steps = parameter_groups(model, recipe)
    assert [p.ndim for p in weights["params"]] == [4, 2]
    assert [g["weight_decay"] for g in (weights, plain, steps)] == [0.1, 0.0, 0.0]
    assert len(plain["params"]) == 2  # of the batch norm
    assert steps["params"] == [model[3].scale]
    assert steps["factor"] == 0.5


def test_step_lr_of_zero_keeps_the_steps(tmp_path):
    model = network()
    train(model, tmp_path, BASE.override({"step_lr": 0}))
    assert model[3].scale.item() == 1.0
    other = network()
    train(other, tmp_path)
    assert other[3].scale.item() != 1.0


def test_schedule_warms_up_then_falls_to_the_end():
    recipe = Recipe(epochs=10, lr=1.0, warmup_epochs=2, final_lr=0.1)
    rates = [learning_rate(recipe, step, 5) for step in range(51)]
    assert rates[0] == pytest.approx(1 / 11)
    assert max(rates) == rates[10] == 1.0
    assert rates[30] == pytest.approx(0.55)
    assert rates[50] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(rates[:11]))
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_ema_averages_weights_and_statistics_and_copies_the_rest():
    model = network()
    ema = Ema(model, decay=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model[1].running_mean.add_(2)
        model[1].num_batches_tracked.add_(3)
    ema.update(model)
    assert_equal_weights(ema.module, model)

    slow = Ema(network(), decay=0.5)
    slow.updates = 1000
    before = slow.module[1].running_mean.clone()
    slow.update(model)
    expected = (before + model[1].running_mean) / 2
    torch.testing.assert_close(slow.module[1].running_mean, expected)
    assert slow.module[1].num_batches_tracked == 3


def test_large_images_are_predicted_in_batches_that_fit_the_cache():
    sizes = []

    class Counting(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return x.mean((2, 3))

    for side in (32, 256, 1024):
        predict(Counting(), np.zeros((9, side, side, 3), np.uint8), NORMALIZE)
    assert sizes == [9, 4, 4, 1, *[1] * 9]


def test_predict_restores_modes_and_does_not_depend_on_the_batch():
    model = network().train()
    model[1].eval()
    images, _ = pictures(30)
    a, b = (predict(model, images, NORMALIZE, batch=n) for n in (7, 30))
    torch.testing.assert_close(a, b)
    assert model.training
    assert not model[1].training
    assert a.shape == (30, 4)
    model.eval()
    with torch.no_grad():
        expected = model(torch.from_numpy(NORMALIZE.apply(images)))
    torch.testing.assert_close(a, expected)
