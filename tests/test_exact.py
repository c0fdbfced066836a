"""The integer reference against a real onnxruntime, and `mpq verify` around it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq
from mpq.checkpoint import load_model, load_safe
from mpq.cli import main
from mpq.errors import DataError, UsageError
from mpq.export import exact, float_to_onnx, to_onnx
from mpq.export.exact import verify_exact
from mpq.export.kernels import KERNELS
from mpq.policy import Policy
from mpq.ptq import calibrate


class Pools(nn.Module):
    """A stem on blocks, both poolings, grouped convolutions, concatenation and a product."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, 2, 3)
        self.grouped = nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(16, 32, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(64, 64, 3, 2, 1, groups=64)
        self.last, self.fc = nn.Conv2d(64, 32, 1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        x = torch.cat([F.relu(self.grouped(x)), F.relu6(self.dilated(x))], 1)
        x = F.avg_pool2d(F.relu(self.depthwise(x)), 2)
        x = self.last(x)
        return self.fc((x * torch.sigmoid(x)).mean((2, 3)))


def write(net: nn.Module, images: Tensor, path: Path, bits: int = 8) -> Path:
    policy = mpq.Policy.uniform(bits, 8)
    graph = mpq.prepare(net.eval(), policy, images)
    calibrate(graph, images, method="minmax")
    return to_onnx(graph, path).path


def operators(report: exact.ExactReport) -> set[str]:
    return {node.op for node in report.nodes if node.mismatches is not None}


@pytest.mark.parametrize("name", ["residual", "depthwise", "se_sigmoid", "shuffle"])
def test_every_integer_of_the_runtime_is_predicted(name: str, tmp_path: Path) -> None:
    images = nets.images(8)
    path = write(nets.build(name), images, tmp_path / "net.onnx", bits=4)
    report = verify_exact(path, nets.images(8, seed=1).numpy())
    assert report.exact, report.differing()
    assert "QLinearConv" in operators(report)
    assert {node.reason for node in report.unpredicted()} <= {"float"}


def test_poolings_products_and_grouped_convolutions_are_predicted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(16, 3, 64, 64)
    report = verify_exact(write(Pools(), images, tmp_path / "net.onnx"), images[:4].numpy())
    assert report.exact, report.differing()
    assert not report.unpredicted()
    wanted = {"QLinearConv", "QLinearConcat", "QLinearMul", "QLinearSigmoid", "QGemm"}
    pools = {"QLinearAveragePool", "QLinearGlobalAveragePool", "NhwcMaxPool", "SpaceToDepth"}
    assert wanted | pools <= operators(report)


def test_the_checkpoint_of_resnet20_is_predicted(mpq_data: Path, tmp_path: Path) -> None:
    net = load_model(mpq_data / "checkpoints" / "resnet20-cifar10.pth").module
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    report = verify_exact(write(net, images, tmp_path / "r20.onnx", bits=4), images.numpy())
    assert report.exact, report.differing()
    assert not report.unpredicted()
    assert sum(node.op == "QLinearConv" for node in report.nodes) == 19


@pytest.mark.parametrize("op", ["QLinearConv", "QLinearAdd", "QGemm", "QLinearGlobalAveragePool"])
def test_a_difference_of_one_step_is_found(
    op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = nets.images(4)
    path = write(nets.build("residual"), images, tmp_path / "net.onnx")
    right = KERNELS[op]

    def wrong(inputs, attributes):
        y = right(inputs, attributes).copy()
        y.reshape(-1)[5] += 1
        return y

    monkeypatch.setitem(KERNELS, op, wrong)
    report = verify_exact(path, images.numpy())
    assert not report.exact
    assert {node.op for node in report.differing()} == {op}
    assert all(node.mismatches == 1 for node in report.differing())


def test_a_float_file_has_nothing_to_predict(tmp_path: Path) -> None:
    images = nets.images(4)
    path = float_to_onnx(mpq.to_float(nets.build("plain"), images), tmp_path / "float.onnx")
    report = verify_exact(path, images.numpy())
    assert report.same_output
    assert not operators(report) - exact.MOVES
    assert {node.reason for node in report.unpredicted()} == {"float"}


def test_other_images_than_the_file_takes_are_refused(tmp_path: Path) -> None:
    images = nets.images(4)
    path = write(nets.build("plain"), images, tmp_path / "net.onnx")
    with pytest.raises(DataError, match="must be float32 of 4 dimensions"):
        verify_exact(path, np.zeros((1, 3, 8, 8), np.uint8))
    with pytest.raises(UsageError, match=r"nowhere\.onnx does not exist"):
        verify_exact(tmp_path / "nowhere.onnx", images.numpy())


def test_the_difference_is_counted_in_steps(tmp_path: Path) -> None:
    images = nets.images(4)
    path = write(nets.build("plain"), images, tmp_path / "net.onnx")
    report = verify_exact(path, images.numpy())
    node = replace(report.nodes[0], mismatches=2, max_step=1.0)
    told = json.loads(replace(report, nodes=(node,)).to_json())
    assert told["exact"] is False
    assert told["nodes"][0]["max_step"] == 1.0


@pytest.fixture(scope="module")
def project(once) -> Path:
    """A folder whose runs/tiny holds a small network of the digits, quantized and exported."""

    def make(folder: Path) -> None:
        (folder / "tiny_digits.py").write_text(NETWORK)
        known: dict[str, Any] = {}
        exec(NETWORK, known)
        torch.manual_seed(0)
        torch.save(known["tiny"]().state_dict(), "tiny.pth")
        tell = ["--model", "tiny_digits:tiny", "--data", "digits", "--normalize", "none"]
        assert main(["analyze", "tiny.pth", *tell, "--num-calib", "32"]) == 0
        assert main(["ptq", "--num-calib", "32", "--effort", "fast"]) == 0
        assert main(["export", "--num-test", "20"]) == 0

    return once("exact-project", make)


NETWORK = """
import torch
from torch import nn

def tiny(classes=10):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes),
    )
"""


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, as working directory."""
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.syspath_prepend(tmp_path / "p")
    return tmp_path / "p"


Capture = pytest.CaptureFixture[str]


def test_a_run_is_verified_again(here: Path, capsys: Capture) -> None:
    report = here / "runs" / "tiny" / "verify.json"
    made = json.loads(report.read_text())
    report.unlink()
    assert main(["verify", "--num-test", "20", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told.pop("file") == "runs/tiny/model.onnx"
    assert told == made == json.loads(report.read_text())
    assert len(told["layers"]) >= 3


def test_a_file_of_another_network_is_refused(here: Path, capsys: Capture) -> None:
    path = here / "runs" / "tiny" / "ptq.pth"
    content = load_safe(path)
    policy = Policy.from_yaml(content["policy"])
    assert policy.model is not None
    other = policy.replace(model=policy.model.replace(sha256="0" * 64))
    torch.save({**content, "policy": other.to_yaml()}, here / "other.pth")
    assert main(["verify", "runs/tiny", "--from", "other.pth"]) == 2
    told = capsys.readouterr().err
    assert "model.onnx was made from another network than the one it is compared with" in told
    assert "--from" in told


def test_a_changed_file_is_found_out(here: Path, capsys: Capture) -> None:
    path = here / "runs" / "tiny" / "model.onnx"
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT32)
    array = onnx.numpy_helper.to_array(bias)
    bias.CopyFrom(onnx.numpy_helper.from_array(array[::-1] * 100 + 40_000, bias.name))
    onnx.save(model, path)
    assert main(["verify", "--num-test", "20"]) == 2
    assert "does not answer as" in capsys.readouterr().err
    assert main(["verify", "--exact"]) == 0  # the runtime still computes what the file says


def test_a_file_of_another_way_is_compared_end_to_end(
    here: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    path = here / "runs" / "tiny" / "model.onnx"
    model = onnx.load(path)
    last = onnx.helper.make_node("Identity", [model.graph.output[0].name], ["answer"])
    model.graph.node.append(last)
    model.graph.output[0].name = "answer"
    onnx.save(model, path)
    assert main(["verify", str(path), "--num-test", "20", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"] == []
    assert "was lowered in another way" in caplog.text


def test_exact_in_a_run_and_on_a_file_alone(here: Path, capsys: Capture) -> None:
    assert main(["verify", "--exact"]) == 0
    assert "every predicted tensor equals" in " ".join(capsys.readouterr().out.split())
    kept = json.loads((here / "runs" / "tiny" / "exact.json").read_text())
    assert kept["exact"]
    assert kept["n"] == 4
    shutil.copy(here / "runs" / "tiny" / "model.onnx", here / "alone.onnx")
    assert main(["verify", "alone.onnx", "--exact", "--num-test", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["n"] == 2
    assert not (here / "exact.json").exists()


def test_exact_fails_where_a_kernel_differs(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = KERNELS["QLinearConv"]
    monkeypatch.setitem(KERNELS, "QLinearConv", lambda i, a: right(i, a) ^ 1)
    assert main(["verify", "--exact"]) == 2
    assert "2 of 8 nodes differ from the integer reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.onnx"], "nowhere.onnx does not exist"),
        (["alone.onnx"], "has no ptq.pth nor qat.pth. Run `mpq ptq` or `mpq qat` there first"),
        (["--exact", "--from", "x.pth"], "--exact needs nothing but the file"),
        (["--num-test", "0"], "0 is not in the range x>=1"),
        (["--exact", "--data", "nothing"], "nothing"),
        (["tiny.pth", "--exact"], "must be an ONNX file. Got a checkpoint of torch"),
    ],
)
def test_bad_input_is_told(here: Path, capsys: Capture, argv: list[str], message: str) -> None:
    shutil.copy(here / "runs" / "tiny" / "model.onnx", here / "alone.onnx")
    assert main(["verify", *argv]) == 2
    assert message in capsys.readouterr().err
