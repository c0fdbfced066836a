"""Diagnosis: networks with one planted problem each, and networks without any."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpq
from mpq import origins, zoo
from mpq.analyze.validate import spearman
from mpq.checkpoint import save_model
from mpq.cli import main
from mpq.cli.terminal import hint
from mpq.diagnose import Diagnosis, Facts, findings
from mpq.diagnose.scores import rank_correlation
from mpq.errors import UsageError
from mpq.export import ExportResult, float_to_onnx, to_onnx
from mpq.noise import interval, margin
from mpq.pipeline.analysis import Analysis
from mpq.policy import DataInfo, ModelInfo
from mpq.ptq import equalize

CLASSES = 5


class Tiny(nn.Module):
    """Four layers and a head; `between` stands before the last convolution."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, CLASSES)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.dw(torch.relu(self.conv1(x))))
        x = self.between(self.conv2(x))
        return self.fc(torch.relu(self.conv3(x)).mean((2, 3)))


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def tiny(plant: Callable[[Tiny], object] = lambda net: None) -> Tiny:
    """A network whose layers all write values of about unit size, and whose answers differ."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tiny().eval()
    x = images()
    for conv in (net.conv1, net.dw, net.conv2, net.conv3):
        scale = 1 / conv(x).std()
        conv.weight.mul_(scale)
        conv.bias.mul_(scale)
        x = torch.relu(conv(x))
    net.fc.weight.mul_(3 / net(images()).std(0).mean())
    plant(net)
    net.fc.bias.sub_(net(images()).mean(0))
    return net


def outlier_weights(net: Tiny) -> None:
    """Input channel 3 of conv2 has weights 40 times as large; the function stays the same."""
    net.dw.weight[3] /= 40
    net.dw.bias[3] /= 40
    net.conv2.weight[:, 3] *= 40


def single_weights(net: Tiny) -> None:
    """One weight in each row of conv2, at a place of its own, where the input is small."""
    rows = net.conv2.weight.flatten(1)
    rows[range(12), [(7 * row) % 72 for row in range(12)]] = 12.0


def outlier_input(net: Tiny) -> None:
    """Channel 2 of what dw reads has 200 times the range; the function stays the same."""
    net.conv1.weight[2] *= 200
    net.conv1.bias[2] *= 200
    net.dw.weight[2] /= 200


def uneven_depthwise(net: Tiny) -> None:
    """Channels of dw whose ranges differ a hundred times; conv2 makes up for it."""
    factors = torch.logspace(-1, 1, 8)
    net.dw.weight *= factors[:, None, None, None]
    net.dw.bias *= factors
    net.conv2.weight /= factors[:, None, None]


def dead_weights(net: Tiny) -> None:
    net.conv2.weight[:6] = 0
    net.conv2.bias[:6] = -1


def dead_answers(net: Tiny) -> None:
    net.conv2.bias[:5] -= 100


@pytest.mark.parametrize(
    ("plant", "where", "cause", "evidence"),
    [
        (outlier_weights, "conv2", "outliers in the weights of input channel 3", "times as large"),
        (single_weights, "conv2", "outliers among its weights", "in output channel"),
        (outlier_input, "dw", "channel 2 of its input is an outlier", "leaves them 1 of 255 steps"),
        (uneven_depthwise, "dw", "depthwise, with channels of very different", "9 weights per"),
        (dead_weights, "conv2", "dead channels", "of 6 of its 12 output channels are 0"),
        (dead_answers, "conv2", "dead channels", "5 of its 12 outputs are 0 for all 64 images"),
    ],
)
def test_a_planted_cause_is_named_and_nothing_else(plant, where, cause, evidence) -> None:
    found = mpq.diagnose(mpq.analyze(tiny(plant), images(), num_calib=64)).findings
    assert [one.where for one in found] == [(where,)]
    assert found[0].problem == "accuracy"
    assert cause in found[0].cause
    assert evidence in found[0].evidence


def test_gains_are_those_of_the_scores_and_of_rescaling() -> None:
    analysis = mpq.analyze(tiny(single_weights), images(), num_calib=64)
    (one,) = mpq.diagnose(analysis).findings
    scores, widths = analysis.sensitivity, dict(analysis.allocation.widths)
    before = scores.predict(widths)
    after = scores.predict(widths | {"conv2": (8, 8)})
    assert one.gain.startswith(
        f"predicted cost of the whole policy from {before:.3g} to {after:.3g}"
    )
    assert one.gain.endswith("+432 bytes")
    assert "{name: conv2, weight: int8/channel, locked: true}" in one.remedy
    (one,) = mpq.diagnose(mpq.analyze(tiny(outlier_input), images(), num_calib=64)).findings
    assert "rescales the channels between conv1 and dw" in one.remedy
    graph = mpq.to_float(tiny(outlier_input), images())
    pair = equalize(graph, images(), mpq.Policy.uniform(8))[0]
    assert (pair.first, pair.second) == ("conv1", "dw")
    assert f"{pair.gain:,.1f} times smaller" in one.gain


def test_a_healthy_network_has_no_findings() -> None:
    found = mpq.diagnose(mpq.analyze(tiny(), images(), num_calib=64, validate=12))
    assert found.findings == ()
    assert str(found).startswith("nothing to report\nlooked at: policy.yaml, sensitivity.json")
    assert found.missing["bench.jsonl"] == "mpq bench"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> ExportResult:
    """A network with an operation and a layer that have no integer kernel; also in float."""
    net, folder = tiny(), tmp_path_factory.mktemp("run")
    net.between = torch.sin
    net.conv3 = nn.Sequential(net.conv3, nn.ReLU(), nn.ConvTranspose2d(12, 12, 2, 2, groups=2))
    graph = mpq.to_float(net, images()[:2])
    float_to_onnx(graph, folder / "float.onnx")
    prepared = mpq.prepare(graph, mpq.Policy.uniform(8))
    mpq.quantize_graph(prepared, images()[:16], effort="fast")
    return to_onnx(prepared, folder / "model.onnx", images=images()[:4], allow_float_fallback=True)


def test_a_layer_without_an_integer_kernel_is_named(exported: ExportResult) -> None:
    (one,) = mpq.diagnose(exported).findings
    assert (one.problem, one.where) == ("integers", ("conv3.2",))
    assert "a transposed convolution in groups has no integer form" in one.cause
    assert "1 layer with " in one.evidence
    assert "asked for W8A8, executed as " in one.evidence
    assert one.remedy == "one without groups, or without both stride and dilation"
    assert mpq.diagnose(exported.certificate) == mpq.diagnose(exported)


def test_a_float_file_says_that_it_is_one(exported: ExportResult) -> None:
    (one,) = mpq.diagnose(mpq.certify(exported.path.with_name("float.onnx"))).findings
    assert "its weights are FLOAT, not integers" in one.cause
    assert one.remedy == "mpq ptq and mpq export: this file is of a float network"


def test_tiny_layers_between_floats_are_measured_and_named(exported: ExportResult) -> None:
    rows = mpq.bench(exported.path, "none", runs=30)
    told = [one for one in mpq.diagnose(exported, rows).findings if one.problem == "latency"]
    assert {"boundaries between float and integer"} <= {one.cause for one in told}
    assert any(one.cause.startswith("small layers") for one in told)
    assert "Sin" in told[0].evidence


def measured(found: Analysis | None = None, **changes: Any) -> Facts:
    """Facts with a file that was measured beside float: by default as accurate, and no faster."""
    row = {"file": "r/model.onnx", "top1": 90.0, "n": 10_000, "ratio_to_float": 1.02, "threads": 1,
           "batch": 1, "latency_ms": {"median": 0.06}}  # fmt: skip
    layer = {"name": "a", "asked": "W8A8", "executed": "QLinearConv", "integer": True,
             "macs": 20_000, "reason": ""}  # fmt: skip
    certificate = {"layers": [layer, {**layer, "name": "b"}], "boundaries": 1, "target": "any",
                   "operators": {"QLinearConv": 4}, "integer_macs_fraction": 1.0}  # fmt: skip
    plain = {**row, "file": "r/float.onnx", "top1": changes.pop("float_top1", 90.0)}
    certificate |= {k: changes.pop(k) for k in certificate.keys() & changes.keys()}
    content = {} if found is None else {"sensitivity": found.to_json(), "policy": found.policy}
    return Facts(certificate=certificate, bench=({**row, **changes}, plain), **content)


def causes(facts: Facts, problem: str) -> list[str]:
    return [one.cause for one in findings(facts).findings if one.problem == problem]


def test_small_layers_do_not_get_faster() -> None:
    (one,) = findings(measured()).findings
    assert (one.problem, one.where) == ("latency", ("a", "b"))
    assert one.cause.startswith("small layers")
    assert "15.0 us per node of 4" in one.evidence
    assert causes(measured(ratio_to_float=1.5), "latency") == []


def test_boundaries_threads_and_float_layers_do_not_get_faster() -> None:
    many = {"operators": {"QLinearConv": 4, "QuantizeLinear": 3, "DequantizeLinear": 3, "Sin": 3}}
    large = {"latency_ms": {"median": 5.0}}
    facts = measured(**many, boundaries=6, **large)
    assert causes(facts, "latency") == ["boundaries between float and integer"]
    assert "around Sin" in findings(facts).findings[0].evidence
    assert causes(measured(threads=4, **large), "latency")[0].startswith("several threads")
    told = causes(measured(integer_macs_fraction=0.2, **large), "latency")
    assert told == ["most of the work is done in float"]
    told = causes(measured(target="onnxruntime-cpu-avx2", **large), "latency")
    assert told[0].startswith("a CPU without VNNI")
    assert causes(measured(**large), "latency") == ["a cause that the files of the run do not show"]


def test_accuracy_that_is_lost_is_told_only_beyond_chance() -> None:
    found = mpq.analyze(tiny(), images(), num_calib=64)
    told = findings(measured(found, top1=80.0, ratio_to_float=2.0)).findings
    assert (
        "top-1 80.00 %, float 90.00 % on the same 10,000 images: 10.00 points" in told[0].evidence
    )
    assert set(told[0].where) < set(found.allocation.widths)
    point = min((p for p in found.front if p.objective <= found.allocation.objective / 2),
                key=lambda p: p.effective_bits)  # fmt: skip
    assert f"--effective-bits {point.effective_bits:.2f}" in told[0].remedy
    assert f"to {point.objective:.3g} nats" in told[0].gain
    assert findings(measured(found, top1=89.5, ratio_to_float=2.0)).findings == ()


def test_a_training_that_was_too_short_is_blamed_and_not_the_budget() -> None:
    known = measured(mpq.analyze(tiny(), images(), num_calib=64), top1=60.0, ratio_to_float=2.0)
    trained = {"calibrated_top1": 89.8, "validation_top1": 60.5, "validation_images": 500,
               "epochs": 1}  # fmt: skip
    (one,) = findings(replace(known, trained=trained)).findings
    assert one.cause.startswith("the training made it worse")
    assert "89.80 % before the training and 60.50 % after 1 epoch, on the same 500" in one.evidence
    assert "mpq qat --epochs 10" in one.remedy
    assert one.gain == "29.30 points without training"
    both = findings(replace(known, trained={**trained, "calibrated_top1": 70.0})).findings
    assert [found.cause[:12] for found in both] == ["the training", "accuracy is "]
    noise = findings(replace(known, trained={**trained, "calibrated_top1": 61.0})).findings
    assert [found.cause for found in noise] == ["accuracy is lost"]


def test_what_is_measured_to_cost_nothing_is_not_blamed() -> None:
    found = mpq.analyze(tiny(outlier_weights), images(), num_calib=64)
    facts = measured(found, ratio_to_float=2.0)
    assert findings(Facts(tensors=found.tensors, **_known(facts))).findings == ()
    few = measured(found, ratio_to_float=2.0, n=100)  # from which nothing follows
    assert len(findings(Facts(tensors=found.tensors, **_known(few))).findings) == 1


def _known(facts: Facts) -> dict[str, Any]:
    return {"policy": facts.policy, "sensitivity": facts.sensitivity, "bench": facts.bench}


def test_scores_that_mislead_are_found_out_and_the_layer_is_named() -> None:
    """Scores of weights alone know nothing of the head, which here multiplies every error."""
    found = mpq.analyze(tiny(), images(), metric="sqnr", validate=40, validation=images(32))
    assert found.validation is not None
    blind, wrong = mpq.diagnose(found).findings
    assert (blind.problem, wrong.problem) == ("scores", "scores")
    assert blind.cause == "the scores look at the weights alone"
    assert (wrong.where, wrong.cause) == (("fc",), "the scores order policies wrongly")
    assert f"divergence is {found.validation.rho:.2f} over 32 random policies" in wrong.evidence
    assert wrong.gain.startswith(f"rho {found.validation.rho:.2f} to 0.")
    assert "--metric kl" in wrong.remedy


def test_rank_correlation_is_that_of_scipy() -> None:
    first, second = [3.0, 1.0, 2.0, 2.0, 9.0], [1.0, 2.0, 2.5, 2.5, 7.0]
    assert rank_correlation(first, second) == pytest.approx(spearman(first, second))


def test_intervals_are_wilsons() -> None:
    assert interval(50.0, 100) == pytest.approx((40.38, 59.62), abs=0.01)
    assert interval(100.0, 360) == pytest.approx((98.94, 100.0), abs=0.01)
    assert interval(0.0, 10)[0] == 0.0
    assert margin(91.73, 91.75, 10_000) == pytest.approx(0.765, abs=0.01)


def test_more_accuracy_lost_than_the_scores_allow() -> None:
    found = mpq.analyze(tiny(), images(), num_calib=64, budget=8.0)
    told = causes(measured(found, top1=60.0, ratio_to_float=2.0), "scores")
    assert told == ["more accuracy is lost than the scores allow"]
    assert causes(measured(found, top1=89.0, ratio_to_float=2.0), "scores") == []


def test_an_untrained_network_is_told_from_a_robust_one() -> None:
    def silence(net: Tiny) -> None:
        net.fc.weight *= 1e-4

    found = mpq.diagnose(mpq.analyze(tiny(silence), images(), num_calib=64)).findings
    assert [one.cause for one in found] == [
        "the answers hardly depend on the images: is this network trained?"
    ]


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[str, str]:
    assert main(list(argv)) == 0
    said = capsys.readouterr()
    return said.out, said.err


def test_a_run_is_diagnosed_by_its_files_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    analysis = mpq.analyze(tiny(outlier_input), images(), num_calib=64)
    analysis.save("runs/a")
    out, err = run(capsys, "diagnose", "runs/a")
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith("1. accuracy: channel 2 of its input is an outlier")
    for line in ("   where     dw\n", "   try       mpq ptq", "   gain      expected"):
        assert line in out
    assert "not known without certificate.json: mpq export" in out
    assert "wrote runs/a/diagnosis.json" in err
    kept = json.loads(Path("runs/a/diagnosis.json").read_text())
    assert kept == mpq.diagnose(analysis).to_json()
    assert [one["where"] for one in kept["findings"]] == [["dw"]]
    assert json.loads(run(capsys, "diagnose", "runs/a/policy.yaml", "--json")[0]) == kept
    assert "no run named: using runs/a\n" in run(capsys, "diagnose")[1]
    assert mpq.diagnose("runs/a").to_json() == kept
    assert Diagnosis.load("runs/a/diagnosis.json") == mpq.diagnose("runs/a")
    Path("runs/a/diagnosis.json").unlink()  # the page asks the files, not what was said of them
    assert "channel 2 of its input is an outlier" in mpq.report("runs/a").read_text()
    hint(Path("runs/a"))
    assert capsys.readouterr().err == "1 finding: mpq diagnose runs/a\n"


def test_page_and_hint_know_of_a_bad_training_as_diagnose_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mpq.analyze(tiny(), images(), num_calib=64).save(tmp_path)
    hint(tmp_path)
    assert capsys.readouterr().err == ""
    metrics = {"calibrated_top1": 90.0, "validation_top1": 60.0, "validation_images": 500}
    torch.save({"metrics": {**metrics, "epochs": 1}}, tmp_path / "qat.pth")
    origins.note(tmp_path, tmp_path, "qat", {"qat.pth": {}})
    (one,) = mpq.diagnose(tmp_path).findings
    assert one.cause.startswith("the training made it worse")
    assert one.cause in mpq.report(tmp_path).read_text()
    capsys.readouterr()
    hint(tmp_path)
    assert capsys.readouterr().err.startswith("1 finding: mpq diagnose ")
    (tmp_path / "origins.json").unlink()  # then the file itself is all there is to ask
    (tmp_path / "qat.pth").write_bytes(b"cut off")
    hint(tmp_path)
    assert capsys.readouterr().err == ""


def test_stale_and_damaged_files_are_not_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mpq.analyze(tiny(outlier_input), images(), num_calib=64).save(tmp_path)
    scores = tmp_path / "sensitivity.json"
    found = json.loads(scores.read_text())
    scores.write_text(json.dumps({**found, "seed": 1}))
    assert "sensitivity.json" in mpq.diagnose(tmp_path).missing
    (tmp_path / "origins.json").unlink()  # then nothing says that they are not of the run
    scores.write_text("{")
    with pytest.raises(UsageError, match=r"sensitivity\.json must be as `mpq analyze MODEL.pth`"):
        mpq.diagnose(tmp_path)
    scores.write_text(json.dumps({"metric": "fisher"}))
    with pytest.raises(UsageError, match=r"is not as mpq writes it\. It lacks 'layers'"):
        mpq.diagnose(tmp_path)
    (tmp_path / "empty").mkdir()
    assert main(["diagnose", str(tmp_path / "empty")]) == 2
    assert "holds nothing of a run" in capsys.readouterr().err
    with pytest.raises(UsageError, match="one run, or what analyze, export, certify and bench"):
        mpq.diagnose()


def test_dead_channels_of_several_layers_are_one_finding() -> None:
    def die(net: Tiny) -> None:
        dead_answers(net)
        net.conv1.bias[:4] -= 100
        net.conv3.bias[:6] -= 100

    (one,) = mpq.diagnose(mpq.analyze(tiny(die), images(), num_calib=64)).findings
    assert set(one.where) == {"conv1", "conv2", "conv3"}
    assert one.evidence.count("for all 64 images") == 2
    assert "; and 1 more; " in one.evidence


def test_tensors_that_nobody_looked_at_are_looked_at(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.build("resnet8", 10)
    info = ModelInfo(arch="resnet8", classes=10, input=(3, 16, 16), normalize="none")
    save_model(tmp_path / "model.pth", model, info=info, data="digits")
    named = info.replace(checkpoint=str(tmp_path / "model.pth"))
    policy = mpq.Policy.uniform(4).replace(model=named, data=DataInfo(name="digits"))
    (tmp_path / "r").mkdir()
    policy.save(tmp_path / "r" / "policy.yaml")
    found = mpq.diagnose(tmp_path / "r")
    assert found.looked_at == ("policy.yaml", "tensors.json")
    kept = json.loads((tmp_path / "r" / "tensors.json").read_text())
    assert kept["images"] == 64
    assert set(kept["layers"]) == set(mpq.to_float(model, torch.zeros(1, 3, 16, 16)).layers)
    assert not (tmp_path / "r" / "origins.json").exists()  # beside which all others were doubtful
    assert mpq.diagnose(tmp_path / "r") == found


def test_a_real_network_has_no_findings(mpq_data: Path) -> None:
    checkpoint = mpq_data / "checkpoints" / "resnet20-cifar10.pth"
    found = mpq.analyze(checkpoint, "cifar10", num_calib=16, normalize="imagenet")
    assert mpq.diagnose(found).findings == ()
    assert len(found.allocation.widths) == 20
