"""What is said of accuracies and drops: interval, float beside it, images, units, and chance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpq import zoo
from mpq.checkpoint import Reading, save_model
from mpq.data import DataSource, open_data
from mpq.data.dataset import ArraySplit
from mpq.data.splits import Splits, divide
from mpq.diagnose.facts import score_unit
from mpq.export.bench import BenchRow, Latency
from mpq.noise import interval, margin
from mpq.pipeline.accuracies import after_training
from mpq.pipeline.analysis import _said
from mpq.pipeline.subject import open_checkpoint
from mpq.policy import Constraints, ModelInfo, Policy, SearchResult
from mpq.report import tables, trained
from mpq.report.grid import agreement_text, plain
from mpq.report.words import NOWHERE, chance, difference, distilled, meaning, measured


def figures(**changes: Any) -> dict[str, Any]:
    known = {"validation_top1": 99.6, "float_top1": 99.8, "validation_images": 500}
    return {**known, "validation_seen": False, **changes}


def test_an_output_without_any_difference_is_exact() -> None:
    first = {"name": "a", "kind": "regression", "agreement": None, "sqnr_db": 999.0}
    told = {"top1_agreement": None, "outputs": [first, {**first, "name": "b", "sqnr_db": 61.26}]}
    assert agreement_text(told) == "a (regression) exact, b (regression) 61.3 dB"


def test_an_accuracy_stands_beside_floats_with_images_interval_and_chance() -> None:
    first, second = measured(figures())
    assert first == "top-1 99.60 % (95 %: 98.6 to 99.9), float 99.80 %, on 500 held-out images"
    assert second.startswith("simulated; no difference beyond chance (-0.20 points of top-1")
    for line in measured(figures(validation_seen=True, validation_top1=45.5, float_top1=100.0)):
        assert len(line) <= 80


def test_training_images_are_called_so() -> None:
    assert measured(figures(validation_seen=True))[2] == (
        "held out of the training images: this network may have been trained on them"
    )


def test_without_images_nothing_is_claimed() -> None:
    assert measured({"validation_top1": None}) == [NOWHERE]
    assert measured({"validation_top1": 91.0}) == ["top-1 91.00 %, simulated"]  # of an older file


@pytest.mark.parametrize(
    ("after", "before", "count", "told"),
    [
        (90.0, 92.0, 100, "no difference beyond chance (-2.00 points of top-1, chance "),
        (90.0, 92.0, 10_000, "-2.00 points of top-1, of which chance explains 0.7"),
        (92.0, 90.0, 10_000, "+2.00 points of top-1, of which chance explains 0.7"),
        (92.0, 92.0, 10, "no difference beyond chance (+0.00 points"),
    ],
)
def test_differences_are_told_only_beyond_chance(after, before, count, told) -> None:
    assert difference(after, before, count).startswith(told)


def row(file: str, top1: float | None, n: int = 10_000) -> dict[str, Any]:
    return {"file": file, "top1": top1, "n": n, "bytes": 1, "threads": 1, "batch": 1,
            "latency_ms": {"median": 1.0, "p10": 1.0, "p90": 1.0}, "ratio_to_float": 1.0,
            "peak_mb": 1}  # fmt: skip


def test_bench_says_which_files_differ_from_float() -> None:
    near, far = row("r/model.onnx", 91.75), row("r/small.onnx", 88.0)
    float_row = row("r/float.onnx", 91.73)
    assert (
        chance([float_row, near])
        == "95 % within 0.54 points; none differs from float's beyond chance"
    )
    assert chance([float_row, near, far]).endswith("beyond chance from float: small.onnx")
    assert chance([near]) == "95 % within 0.54 points"
    shown = plain([tables.bench_table([float_row, near])])
    assert "top-1 in percent of 10,000 images, 95 % within" in " ".join(shown.split())
    none = tables.bench_table([row("a.onnx", None, 0)])
    assert "top-1 in percent" not in none.note


def test_a_line_of_bench_has_its_interval() -> None:
    latency = Latency(1.0, 1.0, 1.0)
    known = BenchRow("a.onnx", 1, 90.0, 100, latency, None, 1, 1, None).to_json()
    low, high = interval(90.0, 100)
    assert f'"top1_interval": [{low}, {high}]' in known
    assert '"top1_interval": null' in BenchRow("a", 1, None, 0, latency, None, 1, 1, None).to_json()


def configuration(name: str, top1: float, n: int = 359) -> dict[str, Any]:
    return {"name": name, "top1": top1, "n": n, "bytes": 1, "ratio": 1.0, "agreement": None,
            "integer": None}  # fmt: skip


def test_the_demo_says_that_its_distillation_gains_nothing() -> None:
    rows = [configuration("QAT 8/4", 98.05), configuration("QAT 8/4, distilled", 99.16)]
    assert distilled(rows).startswith("no gain by distillation beyond chance, which explains 1.")
    note = " ".join(trained.demo_table(rows).note.split())
    assert "top-1 in percent of 359 test images" in note
    assert "no gain by distillation" in note
    better = [configuration("float", 90.0), configuration("float, distilled", 98.0)]
    assert distilled(better).endswith("points) in float, distilled")


def test_teachers_have_their_images_and_chance() -> None:
    rows = [{"name": n, "arch": "a", "normalize": "none", "top1": 97.0} for n in "ab"]
    note = trained.ensemble_table(rows, 144).note
    assert note.startswith("top-1 in percent of 144 validation images; chance explains ")
    assert f"{margin(97.0, 97.0, 144):.2f} points" in note


@pytest.mark.parametrize(
    ("metric", "unit", "said"),
    [
        ("fisher", "nats", "nats: predicted divergence of the answers from float's"),
        ("kl", "nats", "0.02 moves the probability of a class by 10 points at most"),
        ("loss", "nats", "how much the loss on the labels is predicted to grow"),
        ("sqnr", "noise over signal", "has no meaning by itself"),
        ("hawq", "units of hawq", "has no meaning by itself"),
    ],
)
def test_scores_and_drops_have_a_unit_and_a_meaning(metric, unit, said) -> None:
    assert score_unit(metric) == unit
    assert said in meaning(metric)
    layer = {"name": "a", "kind": "conv", "params": 1, "macs": 1}
    point = {"widths": {"a": [8, 8]}, "effective_bits": 8.0, "bytes": 1, "bitops": 1.0,
             "predicted_drop": 0.1}  # fmt: skip
    found = {"metric": metric, "samples": 1, "rows": [], "layers": [layer], "front": [point]}
    assert f"in {unit}; higher hurts more" in tables.sensitivity_table(found).note
    assert f"drop in {unit}" in tables.configurations_table(found).note


@pytest.mark.parametrize(
    ("kind", "judge", "unit"),
    [
        (None, "", "0.25 points of top-1"),
        (None, "top1", "0.25 points of top-1"),
        (None, "miou", "0.25 points of miou"),
        (None, "psnr", "0.25 dB of psnr"),
        (None, "judge:sure", "0.2500 of judge:sure"),
        ("relative", "", "0.25 % of float's top-1"),
        ("relative", "judge:sure", "0.25 % of float's judge:sure"),
    ],
)
def test_a_measured_drop_has_the_unit_of_its_metric(kind, judge, unit) -> None:
    result = SearchResult(effective_bits=5.0, weight_bytes=1, predicted_bytes=1, bitops=1.0,
                          predicted_drop=0.1, measured_drop=0.25)  # fmt: skip
    policy = Policy(result=result, constraints=Constraints(max_drop=0.3, drop_type=kind))
    assert _said(policy, judge).endswith(f"measured drop {unit}")


def test_only_a_checkpoint_that_says_so_was_trained_without_the_held_out_images(
    tmp_path: Path,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.build("resnet8", 10)
    info = ModelInfo(arch="resnet8", classes=10, input=(3, 16, 16), normalize="none")
    save_model(tmp_path / "own.pth", model, info=info, data="digits")
    torch.save(model.state_dict(), tmp_path / "foreign.pth")
    own = open_checkpoint(tmp_path / "own.pth", DataSource("digits"))
    assert not own.seen
    foreign = open_checkpoint(
        tmp_path / "foreign.pth",
        DataSource("digits"),
        reading=Reading("resnet8"),
        normalize=own.normalize,
    )
    assert foreign.seen
    blind = open_checkpoint(tmp_path / "own.pth", DataSource("none"))
    assert not blind.seen
    graph = foreign.graph()
    said = after_training(12.5, graph, foreign)
    assert said["validation_images"] == len(open_data("digits").validation)
    assert said["validation_interval"] == list(interval(12.5, said["validation_images"]))
    assert said["float_top1"] == after_training(50.0, graph, foreign)["float_top1"]
    assert (said["validation_top1"], said["validation_seen"]) == (12.5, True)
    assert after_training(None, graph, blind) == {"validation_top1": None}


def test_a_validation_split_that_data_bring_is_no_part_of_training() -> None:
    images, labels = np.zeros((20, 4, 4, 3), np.uint8), np.arange(20) % 2
    split = ArraySplit(images, labels, (4, 4))
    brought = Splits(("a", "b"), split, split, split, (4, 4))
    assert not divide(brought, name="x", holdout=None, seed=0).split_off
    own = Splits(("a", "b"), split, None, split, (4, 4))
    assert divide(own, name="x", holdout=None, seed=0).split_off
