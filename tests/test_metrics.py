"""Metrics: their values, the intervals of a difference, and what the user gives."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpq._torchvision import declare_missing
from mpq.batch import described, inputs_of, joined, rows, shared, targets_of
from mpq.cli import main
from mpq.errors import DataError, UsageError
from mpq.metrics.builtin import BUILTIN, NAMES, agreement, kinds_of
from mpq.metrics.given import loss_of, metric_of
from mpq.metrics.metric import Metric, compare, mean


def value(name: str, outputs, targets, **options) -> float:
    metric = metric_of(name, **options)
    return metric.value(metric.keep(outputs, (None, targets)))


# -- built in ------------------------------------------------------------------------------------


def test_top1_and_top5_count_labels_among_the_largest_logits() -> None:
    logits = torch.eye(8)[:4] + torch.arange(8) * 0.1
    labels = torch.tensor([0, 1, 7, 4])
    assert value("top1", logits, labels) == 50.0
    assert value("top5", logits, labels) == 100.0
    assert value("top1", logits[..., None, None], labels) == 50.0


def test_miou_is_the_mean_over_classes_that_occur() -> None:
    labels = torch.tensor([[[0, 0], [1, 255]], [[1, 1], [0, -1]]])
    chosen = torch.tensor([[[0, 1], [1, 0]], [[1, 1], [0, 2]]])
    logits = F.one_hot(chosen, 4).movedim(-1, 1).float()
    zero, one = 2 / 3, 3 / 4  # intersection over union of classes 0 and 1; 2 and 3 never count
    assert value("miou", logits, labels) == pytest.approx(100 * (zero + one) / 2)


def test_miou_of_one_channel_takes_its_sign() -> None:
    logits = torch.tensor([[[[1.0, -1.0], [2.0, -2.0]]]])
    assert value("miou", logits, torch.tensor([[[1, 0], [1, 0]]])) == 100.0


def test_psnr_and_ssim_of_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    high = torch.rand(2, 3, 24, 20, generator=generator)
    low = (high + 0.1 * torch.randn(high.shape, generator=generator)).clamp(0, 1)
    error = (low - high).double().square().flatten(1).mean(1)
    assert value("psnr", low, high) == pytest.approx(float((-10 * error.log10()).mean()))
    assert value("psnr", high, high) == 100.0
    assert value("ssim", high, high) == pytest.approx(1.0)
    assert 0.5 < value("ssim", low, high) < 0.99


def test_ssim_is_that_of_torchmetrics() -> None:
    declare_missing()
    reference = pytest.importorskip("torchmetrics.functional.image", reason="needs torchmetrics")
    generator = torch.Generator().manual_seed(1)
    high = torch.rand(2, 1, 32, 32, generator=generator)
    low = (high + 0.2 * torch.randn(high.shape, generator=generator)).clamp(0, 1)
    found = reference.structural_similarity_index_measure(low, high, data_range=1.0)
    assert value("ssim", low, high) == pytest.approx(float(found), abs=0.02)  # it pads the borders


def test_map_needs_detections_and_finds_them() -> None:
    pytest.importorskip("pycocotools", reason="needs pycocotools")
    pytest.importorskip("torchmetrics", reason="needs torchmetrics")
    box = torch.tensor([[10.0, 10.0, 50.0, 60.0]])
    right = [{"boxes": box, "scores": torch.tensor([0.9]), "labels": torch.tensor([1])}]
    truth = [{"boxes": box, "labels": torch.tensor([1])}]
    assert value("map", right, truth) == pytest.approx(100.0)
    wrong = [right[0] | {"labels": torch.tensor([2])}]
    assert value("map", wrong, truth) == pytest.approx(0.0)
    metric = agreement({}, [right])
    assert metric.value(metric.keep(right, (None, right))) == pytest.approx(100.0)
    unsure = [right[0] | {"scores": torch.tensor([0.2])}]
    with pytest.raises(DataError, match=r"for each of 1 images\. Got 2"):
        metric.keep(right * 2, (None, unsure))


def test_agreement_is_by_kind_and_the_mean_over_outputs() -> None:
    boxes = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
    answer = {"boxes": boxes, "scores": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "n": torch.ones(2)}
    kinds = {"boxes": "regression", "scores": "classes", "n": "ignored"}
    metric = agreement(kinds, [answer])
    assert metric.value(metric.keep(answer, (None, answer))) == 100.0
    other = answer | {"boxes": boxes + 0.5, "scores": torch.tensor([[1.0, 0.0], [1.0, 0.0]])}
    explained = 100 * (1 - 0.25 / 1.25)
    found = metric.keep(other, (None, answer))
    assert found == pytest.approx([(explained + 100) / 2, (explained + 0) / 2])
    with pytest.raises(DataError, match="answers of the same form"):
        metric.keep({"boxes": boxes}, (None, answer))


def test_kinds_of_an_answer_of_which_nothing_is_known() -> None:
    assert kinds_of(torch.zeros(2, 5)) == {"output": "classes"}
    assert kinds_of((torch.zeros(2, 5), torch.ones(2, dtype=torch.long))) == {
        "output.0": "regression",
        "output.1": "exact",
    }


@pytest.mark.parametrize(
    ("name", "outputs", "targets", "message"),
    [
        ("top1", torch.zeros(2, 3), None, "needs a class id .* come without.*--metric agreement"),
        ("top1", (torch.zeros(2, 3),) * 2, torch.zeros(2), "looks at one output.*--postprocess"),
        ("top1", torch.zeros(2, 3), torch.tensor([0, 3]), "labels up to 3"),
        ("miou", torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8).long(), r"class ids \[2, 4, 4\]"),
        ("miou", torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 7), "labels below 3.*Got 7"),
        ("psnr", torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2), r"pictures \[1, 3, 4, 4\]"),
        ("ssim", torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), "11 pixels a side"),
        ("map", torch.zeros(1, 3), [{}], "decoded by --postprocess"),
        ("map", [], None, "boxes and labels, but the images come without"),
    ],
)
def test_answers_and_labels_that_a_metric_cannot_take(name, outputs, targets, message) -> None:
    with pytest.raises(DataError, match=message):
        BUILTIN[name].keep(outputs, (None, targets) if targets is not None else (None,))


# -- intervals -----------------------------------------------------------------------------------


def test_a_difference_of_pairs_is_surer_than_that_of_two_means() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(400, generator=generator).double()
    after = before - 0.1 + 0.01 * torch.randn(400, generator=generator)
    metric = Metric("m", lambda outputs, batch: [], mean)
    lost = compare(metric, before.tolist(), after.tolist())
    assert lost.value == pytest.approx(0.1, abs=0.002)
    assert lost.low < lost.value < lost.high
    assert lost.high - lost.low < 0.003  # of two independent means it would be 0.28
    gained = compare(Metric("m", metric.keep, mean, higher=False), before.tolist(), after.tolist())
    assert gained.value == pytest.approx(-lost.value)


def test_a_difference_of_totals_is_drawn_anew() -> None:
    metric = BUILTIN["miou"]
    labels = torch.randint(0, 3, (40, 4, 4), generator=torch.Generator().manual_seed(0))
    right = F.one_hot(labels, 3).movedim(-1, 1).float()
    wrong = right.clone()
    wrong[:, :, 0] = right[:, :, 0].roll(1, dims=1)
    parts = [metric.keep(outputs, (None, labels)) for outputs in (right, wrong)]
    lost = compare(metric, *parts)
    assert 0 < lost.low < lost.value < lost.high < 100
    assert lost == compare(metric, *parts)
    one = compare(metric, parts[0][:1], parts[1][:1])
    assert (one.low, one.high) == (-math.inf, math.inf)


# -- what the user gives -------------------------------------------------------------------------


class Mae:
    higher_is_better = False

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.total += float((outputs - targets).abs().sum())
        self.count += targets.numel()

    def compute(self) -> Tensor:
        return torch.tensor(self.total / self.count)


@pytest.mark.parametrize("given", [Mae, Mae(), lambda: Mae()])
def test_an_object_with_update_and_compute(given) -> None:
    metric = metric_of(given)
    assert not metric.higher
    parts = metric.keep(torch.zeros(2, 3), (None, torch.ones(2, 3)))
    parts += metric.keep(torch.zeros(1, 3), (None, 4 * torch.ones(1, 3)))
    assert metric.value(parts) == pytest.approx(2.0)
    assert metric.value(parts) == pytest.approx(2.0)  # of a fresh object each time


def test_a_function_gives_a_value_an_image_or_one_a_batch() -> None:
    each = metric_of(lambda outputs, batch: (outputs - batch[1]).abs().mean(1))
    assert each.keep(torch.zeros(2, 3), (None, torch.ones(2, 3))) == [1.0, 1.0]
    whole = metric_of(lambda outputs, batch: outputs.sum(), lower=True)
    assert not whole.higher
    assert whole.value(whole.keep(torch.ones(2, 3), ())) == 6.0


def test_torchmetrics_objects_are_metrics() -> None:
    declare_missing()
    classification = pytest.importorskip("torchmetrics.classification", reason="torchmetrics")
    metric = metric_of(classification.MulticlassAccuracy(num_classes=3, average="micro"))
    parts = metric.keep(torch.eye(3), (None, torch.tensor([0, 1, 1])))
    assert metric.value(parts) == pytest.approx(2 / 3)


def failing(outputs, batch):
    raise KeyError("mask")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("top2", r"one of top1, .*, or module:function. Got 'top2'"),
        (lambda outputs: 1.0, "must be a function of outputs and batch"),
        (lambda: 3, r"an object with update.* Got int"),
        (7, "must be a function of outputs and batch"),
    ],
)
def test_what_is_no_metric(given, message) -> None:
    with pytest.raises(UsageError, match=message):
        metric_of(given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (failing, r"failing failed with KeyError: 'mask'.* It was given float32 \[2, 3\], tuple"),
        (lambda outputs, batch: outputs, r"one number .* Got float32 \[2, 3\]"),
        (lambda outputs, batch: float("nan"), "a finite number. Got nan"),
        (lambda outputs, batch: torch.full((2,), math.inf), "a finite number. Got inf"),
    ],
)
def test_a_metric_that_fails_says_what_it_was_given(given, message) -> None:
    metric = metric_of(given)
    with pytest.raises(UsageError, match=message):
        metric.value(metric.keep(torch.zeros(2, 3), (torch.zeros(2), None)))


def test_higher_is_better_of_what_is_built_in() -> None:
    assert "agreement" in NAMES
    with pytest.raises(UsageError, match="higher is better of the metric miou"):
        metric_of("miou", lower=True)
    with pytest.raises(UsageError, match="at least one batch"):
        metric_of("psnr").value([])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda outputs, batch: outputs,
            r"loss .* must give a scalar tensor. Got float32 \[2, 3\]",
        ),
        (lambda outputs, batch: 1.0, "must give a scalar tensor. Got float"),
        (failing, "loss failing failed with KeyError"),
    ],
)
def test_a_loss_must_be_a_scalar(function, message) -> None:
    with pytest.raises(UsageError, match=message):
        loss_of(function)(torch.zeros(2, 3), ())


# -- batches -------------------------------------------------------------------------------------


def test_inputs_and_targets_of_a_batch() -> None:
    x, y = torch.zeros(2, 3), torch.ones(2)
    assert inputs_of(x) is inputs_of((x, y)) is inputs_of({"image": x, "mask": y}) is x
    assert targets_of(x) is targets_of((x,)) is None
    assert targets_of((x, y)) is targets_of({"x": x, "label": y}) is y
    assert targets_of([x, y, y]) == (y, y)
    assert set(targets_of({"x": x, "mask": y})) == {"x", "mask"}
    with pytest.raises(DataError, match=r"a batch must be .* Got \{mask: float32 \[2\]\}"):
        inputs_of({"mask": y})


def test_batches_are_joined_and_shared_out() -> None:
    one = (torch.arange(4), [{"boxes": torch.zeros(n, 4)} for n in range(4)], "a")
    both = joined([one, one])
    assert both[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert len(both[1]) == 8
    assert shared(one, 1, 2)[0].tolist() == [1, 3]
    assert len(rows(both, slice(3), 8)[1]) == 3
    with pytest.raises(DataError, match=r"one structure.* int64 \[4\].* int64 \[2, 2\]"):
        joined([torch.arange(4), torch.ones(2, 2).long()])
    assert described({"a": [1, torch.zeros(2)]}) == "{a: list of (int, float32 [2])}"


# -- on the command line -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--metric top2", "--metric must be one of .*top1"),
        ("--lower-is-better", "go with --metric"),
        ("--metric mine:none", "has no callable 'none'"),
        ("--batches mine:number", "must be a DataLoader or a list of batches.* Got int"),
        ("--batches mine:broken", "failed with ZeroDivisionError"),
        ("--metric fisher --metric kl", "one of a kind"),
        ("--loss mine:missing", "has no callable 'missing'"),
        ("--metric kl --loss mine:number", "--loss goes with --metric fisher or gradient"),
    ],
)
def test_mistakes_are_answered_in_one_message(
    arguments: str, message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))\n"
        "def number(*_): return 3\n"
        "def broken(): 1 / 0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["analyze", "mine:net", "--data", "none", *arguments.split()]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))
