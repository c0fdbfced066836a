from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from nets import MINE
from PIL import Image

from mpq.checkpoint import load_safe
from mpq.cli import main
from mpq.data import Normalization, load_arrays, open_data
from mpq.latency import LatencyProfile, LayerLatency
from mpq.pipeline.evaluating import validate
from mpq.pipeline.exporting import enough
from mpq.pipeline.quantizing import load_quantized
from mpq.pipeline.subject import DataSource
from mpq.pipeline.training import new_subject, run_train
from mpq.policy import Policy
from mpq.train.ensemble import load_ensemble
from mpq.train.plan import Hooks, TrainingPlan
from mpq.train.recipe import Recipe

MPQ = [sys.executable, "-c", "import sys; from mpq.cli import main; sys.exit(main())"]
QUICK = {"epochs": 4, "batch": 64, "lr": 0.1, "flip": False}
FAST = ["--epochs", "1", "--set", "batch=128"]


@pytest.fixture(scope="module")
def project(once) -> Path:
    """A folder with `model.pth`, trained on the digits, and an analysis of it in runs/model."""

    def make(folder: Path) -> None:
        subject = new_subject("resnet8", DataSource("digits"))
        run_train(subject, TrainingPlan(Recipe.load("plain").override(QUICK)), folder / "model.pth")
        assert main(["analyze", "model.pth", "--num-calib", "64"]) == 0

    return once("pipeline-project", make)


@pytest.fixture
def here(project, tmp_path, monkeypatch) -> Path:
    """A copy of the project, as working directory."""
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


@pytest.mark.parametrize(("macs", "images"), [(0, 1000), (4e7, 1000), (3e8, 166), (4e9, 128)])
def test_a_large_network_is_verified_on_fewer_images(macs: float, images: int) -> None:
    layers = {name: SimpleNamespace(macs=macs / 2) for name in ("a", "b")}
    assert enough(SimpleNamespace(layers=layers)) == images  # type: ignore[arg-type]


def say(capsys, *argv: str) -> tuple[str, str]:
    """Run a command that must succeed; what it wrote to stdout and stderr."""
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def as_json(capsys, *argv: str) -> dict[str, object]:
    return json.loads(say(capsys, *argv, "--json")[0])


def test_all_images_may_be_trained_on(here, capsys):
    argv = ["train", "resnet8_conv", "--data", "digits", *FAST, "-o", "all.pth"]
    assert "no images were held out" in say(capsys, *argv, "--holdout", "0")[0]
    argv = ["qat", "--policy", "runs/model/policy.yaml", *FAST, "-o", "all"]
    told = as_json(capsys, *argv, "--holdout", "0")
    assert told["validation_top1"] is told["calibrated_top1"] is None
    record = json.loads(Path("all/metrics.jsonl").read_text())
    assert record["val_top1"] is None
    held = as_json(capsys, *argv[:-1], "held", "--holdout", "50")["validation_top1"]
    assert held * 50 / 100 == pytest.approx(round(held * 50 / 100))  # of 50 images


def test_training_says_what_it_gained_or_cost(here, capsys):
    train = ("train", "resnet8", "--data", "digits", "--init", "model.pth", "-o", "b.pth")
    qat = ("qat", "--policy", "runs/model/policy.yaml", "-o", "a")
    for argv, start in ((qat, "what mpq ptq gives"), (train, "model.pth")):
        out, err = say(capsys, *argv, *FAST, "--set", "lr=1")
        after = float(re.search(r"top-1 (\S+) %", out)[1])
        before = float(re.search(r"before training it was (\S+) %", err)[1])
        assert 80 < before <= 100
        assert after < before
        assert "training cost accuracy" in err
        assert f"--set lr=0.1, or keep {start}" in err


def test_several_budgets_from_one_scoring(here, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    argv = ["analyze", "model.pth", "--num-calib", "64", "-o", "b"]
    out, err = say(capsys, *argv, "--effective-bits", "4.5,6,7")
    assert "scores from runs/.scores/" in err  # another run of the same network
    assert "wrote b/policy.yaml, b/policy-6.yaml, b/policy-7.yaml" in err
    budgets = [Policy.load(f"b/{n}").result for n in FOUND]
    assert [r.effective_bits <= b for r, b in zip(budgets, (4.5, 6, 7), strict=True)] == [True] * 3
    assert budgets[0].effective_bits < budgets[1].effective_bits < budgets[2].effective_bits
    assert "policy-6.yaml" in out
    data = json.loads(Path("b/sensitivity.json").read_text())
    assert [c["file"] for c in data["choices"]] == FOUND
    listed = [list(c["widths"].items()) for c in data["front"]]
    assert all(list(c["widths"].items()) in listed for c in data["choices"])

    told = as_json(capsys, "diff", "b/policy.yaml", "b/policy-7.yaml")
    assert told["bytes"] == budgets[2].weight_bytes - budgets[0].weight_bytes
    assert told["bitops"] == budgets[2].bitops - budgets[0].bitops
    assert len(told["changes"]) > 0

    again = ["analyze", "model.pth", "--num-calib", "64", "-o", "b", "--force"]
    assert "scores from b/sensitivity.json" in say(capsys, *again)[1]
    assert "scores from" not in say(capsys, *again, "--rescore")[1]
    assert "scores from" not in say(capsys, *again, "--num-calib", "32")[1]
    assert "scores from" not in say(capsys, *again, "--num-calib", "32", "--seed", "1")[1]


def test_budgets_of_time_and_activations(here, capsys):
    names = [layer["name"] for layer in json.loads(SENSITIVITY.read_text())["layers"]]
    edges = dict.fromkeys(itertools.pairwise(names), 0.2)
    costs = {name: LayerLatency(1.0, 3.0) for name in names}
    LatencyProfile("cpu", "ort", 1, 1, costs, edges, 0.5).save(Path("times.json"))
    argv = ["analyze", "model.pth", "--num-calib", "64", "--bits", "16,8", "-o", "t"]
    assert main([*argv, "--max-latency-ms", "17"]) == 2
    assert "profile.json" in capsys.readouterr().err
    argv += ["--profile", "times.json"]
    told = as_json(capsys, *argv, "--max-latency-ms", "17")
    wide = sum(
        p[0] == 16 for p in json.loads(Path("t/sensitivity.json").read_text())["chosen"].values()
    )
    assert wide == 4  # 8.5 ms, two more for each wide layer, and 0.2 where they begin and end
    assert told["latency_ms"] <= 17
    assert main([*argv, "--max-latency-ms", "3", "--force"]) == 2
    assert re.search(r"max_latency_ms must be in 8\.5\.\.24\.5, got 3", capsys.readouterr().err)
    assert main([*argv, "--max-activation-mb", "0.0001", "--force"]) == 2
    assert "max_activation_mb must be in 0." in capsys.readouterr().err


SENSITIVITY = Path("runs/model/sensitivity.json")
FOUND = ["policy.yaml", "policy-6.yaml", "policy-7.yaml"]


@pytest.mark.parametrize("count", [1, 3])
def test_so_few_images_that_splits_are_empty_will_do(tmp_path, monkeypatch, capsys, count):
    monkeypatch.chdir(tmp_path)
    Path("few_images.py").write_text(MINE)
    known: dict[str, Any] = {}
    exec(MINE, known)
    torch.save(known["tiny"]().state_dict(), "model.pth")
    images, _ = load_arrays(open_data("digits").train)
    Path("few").mkdir()
    for number, image in enumerate(images[:count]):
        Image.fromarray(image).save(f"few/{number}.png")
    named = ["--model", "few_images:tiny", "--normalize", "none", "--data", "few", "-o", "u"]
    assert main(["analyze", "model.pth", *named, "--effective-bits", "6"]) == 0
    assert "no images were held out" in say(capsys, "ptq", "--policy", "u")[0]
    assert "of 1 image, at most" in say(capsys, "export", "u/ptq.pth")[0]
    assert "on 1 images" in say(capsys, "verify", "u/model.onnx", "--exact")[0]
    assert "accuracy is not measured" in say(capsys, "bench", "u/model.onnx", "--runs", "2")[1]


def test_images_without_labels_will_do(here, capsys, caplog):
    images, _ = load_arrays(open_data("digits").train)
    Path("photos").mkdir()
    for number, image in enumerate(images[:200]):
        Image.fromarray(image).save(f"photos/{number}.png")
    argv = ["analyze", "model.pth", "--num-calib", "64", "-o", "u", "--data", "photos"]
    assert as_json(capsys, *argv, "--max-drop", "50", "--minimize", "size")["measured_drop"] <= 50
    assert "data photos have no labels" in caplog.text
    assert (
        as_json(capsys, "ptq", "--policy", "u/policy.yaml", "--effort", "fast")["validation_top1"]
        > 80
    )
    found = as_json(capsys, "qat", "--policy", "u/policy.yaml", "-o", "v", *FAST)
    assert found["validation_top1"] > 80  # agreement with the network as it was
    told = as_json(capsys, "export", "v/qat.pth")
    assert told["top1_agreement"] > 0.9
    assert "accuracy is not measured" in say(capsys, "bench", "v/model.onnx", "--runs", "2")[1]
    for command in (["train", "resnet8", "-o", "f.pth"], ["ensemble", "model.pth", "-o", "e.pth"]):
        assert main([*command, "--data", "photos"]) == 2
        assert "needs labels, but the images of data photos" in capsys.readouterr().err


def test_more_images_without_labels_are_learned_from_a_teacher(here, capsys):
    images, labels = load_arrays(open_data("digits").train)
    for number in range(100):
        path = Path(f"few/{labels[number]}/{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[number]).save(path)
    Path("photos").mkdir()
    for number, image in enumerate(images[100:900]):
        Image.fromarray(image).resize((20, 20)).save(f"photos/{number}.png")
    more = ["--unlabelled", "photos", "--teacher", "model.pth", "--epochs", "5"]
    plan = ["--set", "batch=64", "--set", "temperature=1", "--set", "flip=false"]
    argv = ["train", "resnet8", "--data", "few", *more, *plan, "--set", "lr=0.1", "-o", "s.pth"]
    say(capsys, *argv)
    told = as_json(capsys, "ensemble", "s.pth", "--data", "digits", "-o", "e.pth")
    assert told["validation_top1"] > 60
    argv = ["qat", "--policy", "runs/model", *more, *plan, "--data", "few", "-o", "q"]
    say(capsys, *argv)  # its own validation images are a dozen
    found = load_quantized(Path("q/qat.pth"), DataSource("digits"))
    top1 = validate(found.graph, found.subject)["validation_top1"]
    assert top1 is not None
    assert top1 > 80
    assert main([*argv[:3], "--unlabelled", "photos"]) == 2
    assert "--unlabelled photos needs a --teacher" in capsys.readouterr().err


def test_a_budget_that_is_measured(here, capsys):
    argv = ["analyze", "model.pth", "--num-calib", "64", "-o", "d", "--max-drop"]
    told = as_json(capsys, *argv, "60", "--minimize", "size")
    assert told["measured_drop"] <= 60
    policy = Policy.load("d/policy.yaml")
    assert policy.constraints.max_drop == 60
    assert policy.constraints.drop_type == "absolute"
    measured = json.loads(Path("d/sensitivity.json").read_text())["measured"]
    assert measured[0]["drop"] == pytest.approx(told["measured_drop"], abs=1e-3)
    chance = ["--bits", "2", "--act-bits", "2"]
    assert main([*argv, "0", "--drop-type", "relative", "--force", *chance]) == 2
    assert "max_drop must be at least" in capsys.readouterr().err


def test_scores_are_held_against_measurements(here, capsys, arranged):
    argv = ["analyze", "model.pth", "--num-calib", "64", "-o", "runs/model", "--force"]
    out, _ = say(capsys, *argv, "--validate", "12")
    (rho,) = re.findall(r"against 12 measured policies: Spearman's rho (-?[\d.]+)", out)
    truth = json.loads(Path("runs/model/validation.json").read_text())
    assert truth["rho"] == pytest.approx(float(rho), abs=1e-3)
    assert truth["rho"] > 0.5
    assert len(truth["policies"]) == 12
    assert all(p["kl"] > 0 for p in truth["policies"])
    assert Path("runs/model/validation.png").read_bytes().startswith(b"\x89PNG")
    say(capsys, "report", "runs/model")
    page = Path("runs/model/report.html").read_text()
    assert "Scores against measurements" in page
    assert "Spearman" in page


def test_the_whole_way_in_the_exact_forms(here, capsys, monkeypatch, arranged):
    monkeypatch.setenv("COLUMNS", "80")
    shutil.rmtree("runs")
    out, err = say(capsys, "train", "resnet8_conv", "--data", "digits", *FAST, "-o", "small.pth")
    assert "epoch 1/1  loss" in err
    assert "next: mpq analyze small.pth" in err
    assert sorted(p.name for p in here.glob("small*")) == ["small.pth", "small.train"]
    assert [p.name for p in (here / "small.train").iterdir()] == ["metrics.jsonl"]

    out, err = say(capsys, "ensemble", "model.pth", "small.pth", "-o", "ens.pth")
    assert "together (mean)" in out
    assert "measured on 144 validation images of digits" in err

    out, err = say(capsys, "analyze", "model.pth")
    assert "optimal: 4." in out
    assert "wrote runs/model/policy.yaml" in err
    names = {p.name for p in Path("runs/model").iterdir()}
    told = {"policy.yaml", "sensitivity.json", "tensors.json", "sensitivity.png", "pareto.png"}
    assert names == {*told, "origins.json", ".policy.schema.json"}

    shutil.copy("runs/model/policy.yaml", "p.yaml")
    out, err = say(capsys, "qat", "--policy", "p.yaml", "--teacher", "ens.pth", *FAST)
    assert "teacher ens.pth: model, small" in err
    told = r"^top-1 \d+\.\d\d % \(95 %: .*\), float \d+\.\d\d %, on 144 held-out images$"
    assert re.search(told, out, re.M)
    assert re.search(r"^simulated; .* points of top-1.*chance", out, re.M)
    names = {p.name for p in Path("runs/p").iterdir()}
    assert names == {"policy.yaml", "qat.pth", "metrics.jsonl", "origins.json"}
    assert load_safe(Path("runs/p/qat.pth"))["metrics"]["teachers"] == ["model", "small"]

    out, err = say(capsys, "export", "--onnx")
    assert "no file named: using runs/p/qat.pth" in err
    assert "100.0% of the MACs run as integers" in out
    certificate = json.loads(Path("runs/p/certificate.json").read_text())
    assert {row["executed"] for row in certificate["layers"]} == {"QLinearConv", "QGemm"}
    assert json.loads(Path("runs/p/verify.json").read_text())["top1_agreement"] >= 0.99

    out, err = say(capsys, "bench", "--runs", "3")
    assert "no file named: using runs/p/model.onnx" in err
    rows = [json.loads(line) for line in Path("runs/p/bench.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == ["runs/p/float.onnx", "runs/p/model.onnx"]
    assert rows[1]["bytes"] < rows[0]["bytes"] / 4
    assert rows[1]["top1"] > 50

    out, _ = say(capsys, "report")
    assert out == "wrote runs/p/report.html\n"
    found = json.loads(Path("runs/p/ranges.json").read_text())
    assert found["images"] == 32
    assert 20 < found["layers"][0]["weight"]["sqnr"] < 60
    assert "Weights and inputs of the worst layers" in Path("runs/p/report.html").read_text()


def test_an_ensemble_joins_another_with_its_own_normalization(here, capsys):
    as_json(capsys, "ensemble", "model.pth", "--normalize", "cifar10", "-o", "one.pth")
    told = as_json(capsys, "ensemble", "model.pth", "one.pth", "-o", "two.pth")
    assert [m["name"] for m in told["members"]] == ["model", "model"]
    first, second = load_ensemble(Path("two.pth")).members
    assert str(second.normalize) == str(Normalization.parse("cifar10")) != str(first.normalize)
    # The data of the first file count, also where it is an ensemble.
    again = as_json(capsys, "ensemble", "two.pth", "-o", "three.pth")
    assert again["validation_top1"] == told["validation_top1"]


def test_a_command_without_input_takes_the_newest_run(here, capsys):
    say(capsys, "analyze", "model.pth", "--num-calib", "32", "-o", "elsewhere/b")
    _, err = say(capsys, "ptq", "--effort", "fast")
    assert "no file named: using elsewhere/b/policy.yaml" in err
    assert Path("elsewhere/b/ptq.pth").is_file()
    _, err = say(capsys, "ptq", "--effort", "fast", "--policy", "runs/model")
    assert "wrote runs/model/ptq.pth" in err
    _, err = say(capsys, "report")
    assert "no run named: using runs/model" in err


def test_a_policy_edited_by_hand_is_obeyed(here, capsys):
    policy = yaml.safe_load(Path("runs/model/policy.yaml").read_text())
    policy["layers"] = [
        {"name": "layer3.*.conv?", "weight": "int4/channel"},
        {"name": "conv1", "weight": "float", "activation": "float", "locked": True},
    ]
    Path("p.yaml").write_text("# mine\n" + yaml.safe_dump(policy))
    say(capsys, "ptq", "--policy", "p.yaml", "--effort", "fast")
    assert Path("runs/p/policy.yaml").read_text().startswith("# mine\n")
    plans = load_quantized(Path("runs/p/ptq.pth"), DataSource()).graph.plans
    assert plans["conv1"].choice.weight is None
    assert str(plans["layer3.0.conv1"].choice.weight) == "int4/channel"
    assert str(plans["layer2.0.conv1"].choice.weight) == "int8/channel"

    say(capsys, "analyze", "model.pth", "--num-calib", "32", "--locked", "p.yaml", "-o", "l")
    kept = Policy.load("l/policy.yaml").resolve(list(plans))
    assert kept["conv1"].weight is None


def test_the_checkpoint_is_found_from_anywhere(here, capsys, monkeypatch, tmp_path):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    argv = ["ptq", "--policy", "../p/runs/model/policy.yaml", "--effort", "fast", "-o", "r"]
    _, err = say(capsys, *argv)
    assert "wrote r/ptq.pth" in err


@pytest.mark.parametrize(
    ("argv", "widths"),
    [
        (["--bits", "16,8,4"], {16, 8, 4}),
        (["--bits", "16", "8", "4"], {16, 8, 4}),
        (["--bits", "8", "--bits", "4"], {8, 4}),
        (["--bits", "8,4", "--act-bits", "8,4"], {8, 4}),
    ],
)
def test_widths_may_be_listed_or_repeated(here, capsys, argv, widths):
    say(capsys, "analyze", *argv, "model.pth", "--data", "none", "-o", "w")
    scored = json.loads(Path("w/sensitivity.json").read_text())["rows"]
    assert {r["bits"] for r in scored if r["part"] == "weight"} == widths
    assert ({r["bits"] for r in scored if r["part"] == "activation"} == {8, 4}) == (
        "--act-bits" in argv
    )


def test_without_data_the_weights_alone_are_scored_and_data_may_come_later(here, capsys, caplog):
    info = load_safe("model.pth")
    torch.save(info["state"], "foreign.pth")  # neither data nor normalization are known
    say(capsys, "analyze", "foreign.pth", "--data", "none", "--input-size", "16")
    assert "scored by the SQNR of their weights" in caplog.text
    policy = Policy.load("runs/foreign/policy.yaml")
    assert policy.model.normalize == ""
    assert policy.data.samples == 0
    say(capsys, "ptq", "--data", "digits", "--effort", "fast")
    assert "taking normalization none, under which 256 training images" in caplog.text
    told = as_json(capsys, "export", "--num-test", "50")
    assert told["top1_agreement"] is not None  # the data went into ptq.pth


def test_export_needs_the_checkpoint_for_the_comparison_only(here, capsys, caplog):
    say(capsys, "ptq", "--effort", "fast")
    Path("model.pth").unlink()
    out, _ = say(capsys, "export", "--data", "none")
    assert "no float.onnx to compare with: the checkpoint model.pth" in caplog.text
    assert "not verified: there are no images" in out
    assert not Path("runs/model/verify.json").exists()
    assert not Path("runs/model/float.onnx").exists()
    assert Path("runs/model/model.onnx").is_file()


def test_a_killed_qat_is_resumed_bit_for_bit(here, capsys):
    fast = ["--epochs", "2", "--set", "batch=128", "--data", "digits"]
    say(capsys, "qat", *fast, "-o", "whole")
    argv = ["qat", "--policy", "runs/model/policy.yaml", *fast, "-o", "parts"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*MPQ, *argv],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        # A test run in the background hands on that it ignores the signal.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as run:
        for line in run.stderr:
            if line.startswith("epoch 1/2"):
                break
        run.send_signal(signal.SIGINT)
        err = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert err.splitlines()[-1] == (
        "interrupted; no file is half-written. mpq qat ... --resume goes on from what was saved, "
        "or starts if nothing was"
    )
    assert not Path("parts/qat.pth").exists()

    files = sorted(p.name for p in Path("parts").iterdir())
    assert main(argv) == 2
    assert (
        "holds an unfinished run (checkpoint.pth). Go on with --resume" in capsys.readouterr().err
    )
    assert main([*argv, "--resume", "--set", "lr=0.5"]) == 2
    assert "recipe.lr was 0.01, is 0.5" in capsys.readouterr().err
    assert sorted(p.name for p in Path("parts").iterdir()) == files

    _, err = say(capsys, *argv, "--resume")
    assert "epoch 1/2" not in err
    assert "epoch 2/2" in err
    whole, parts = (load_safe(Path(f, "qat.pth")) for f in ("whole", "parts"))
    assert whole["state"].keys() == parts["state"].keys()
    for name, tensor in whole["state"].items():
        assert torch.equal(tensor, parts["state"][name]), name
    assert not Path("parts/checkpoint.pth").exists()
    assert len(Path("parts/metrics.jsonl").read_text().splitlines()) == 2


def test_a_resumed_run_keeps_its_policy(here, capsys, monkeypatch):
    from mpq.pipeline import quantizing

    def interrupted(model, data, plan, run, hooks):
        def stop(record):
            raise KeyboardInterrupt

        return real(model, data, plan, run, replace(hooks or Hooks(), on_epoch=stop))

    real = quantizing.fit
    monkeypatch.setattr(quantizing, "fit", interrupted)
    argv = ["qat", "--epochs", "2", "--set", "batch=128"]
    assert main(argv) == 130
    monkeypatch.setattr(quantizing, "fit", real)
    policy = Path("runs/model/policy.yaml")
    policy.write_text(
        policy.read_text().replace("default: {weight: int8", "default: {weight: int6")
    )
    policy.write_text(policy.read_text().replace("int4/channel", "int6/channel"))
    assert main([*argv, "--resume"]) == 2
    assert "must be of the same run to be resumed, but model was" in capsys.readouterr().err


def test_real_network(mpq_data, tmp_path, monkeypatch, capsys):
    checkpoint = mpq_data / "checkpoints" / "resnet20-cifar10.pth"
    monkeypatch.chdir(tmp_path)
    argv = ["--data", "cifar10", "--data-root", str(mpq_data)]
    say(capsys, "analyze", str(checkpoint), *argv, "--num-calib", "64", "-o", "r")
    say(capsys, "ptq", "--num-calib", "64", *argv[2:])
    say(capsys, "export", "--num-test", "100", *argv[2:])
    certificate = json.loads(Path("r/certificate.json").read_text())
    assert {row["executed"] for row in certificate["layers"]} == {"QLinearConv", "QGemm"}
    assert certificate["integer_macs_fraction"] == 1.0
    out, _ = say(capsys, "bench", "--num-test", "250", "--runs", "2", "--json", *argv[2:])
    row = json.loads(out)["rows"][1]
    assert row["top1"] >= 88
    assert row["bytes"] < 180_000
