"""`mpq ptq`: efforts, an interruption and its resumption, and what the help promises."""

from __future__ import annotations

import json
from pathlib import Path

import nets
import pytest
import torch
from torch import nn

from mpq import zoo
from mpq.checkpoint import load_safe, save_model
from mpq.cli import main
from mpq.policy import ModelInfo, Policy
from mpq.ptq import blockwise
from mpq.spec import ROUNDED_16

BEST = ("ptq", "--effort", "best", "--iterations", "2", "--num-calib", "24")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a W4A4 policy for a small network with random weights."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = zoo.build("resnet8", 10)
    info = ModelInfo(arch="resnet8", classes=10, input=(3, 16, 16), normalize="none")
    save_model(Path("model.pth"), module, info=info, data="digits")
    named = {"model": info.replace(checkpoint="model.pth")}
    data = Policy().data.replace(name="digits")
    policy = Policy.uniform(4, 4).replace(**named, data=data)
    Path("p.yaml").write_text(policy.to_yaml())
    return tmp_path


def state(run: str, stage: str = "ptq") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_safe(Path(run) / f"{stage}.pth")["state"]
    return found


def test_best_is_resumed_bit_for_bit(here, monkeypatch, capsys):
    assert main([*BEST, "--policy", "p.yaml", "-o", "whole", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["effort"] == "best"
    assert told["images"] == 24
    assert not Path("whole/rounding.pth").exists()
    real, calls = blockwise.learn_block, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(blockwise, "learn_block", interrupted)
    argv = [*BEST, "--policy", "p.yaml", "-o", "cut"]
    assert main(argv) == 130
    assert "mpq ptq ... --resume goes on from what was saved" in capsys.readouterr().err
    assert Path("cut/rounding.pth").exists()
    assert not Path("cut/ptq.pth").exists()
    monkeypatch.setattr(blockwise, "learn_block", real)
    assert main(argv) == 2
    assert "holds an unfinished run (rounding.pth). Go on with --resume" in capsys.readouterr().err
    assert main([*argv, "--resume", "--seed", "3"]) == 2
    told = capsys.readouterr().err
    assert "must be of the same run to be resumed, but" in told
    assert "seed was 0, is 3" in told
    assert main([*argv, "--resume"]) == 0
    whole, cut = state("whole"), state("cut")
    assert all(torch.equal(value, cut[name]) for name, value in whole.items())
    assert not Path("cut/rounding.pth").exists()
    assert main([*argv, "--resume"]) == 2
    assert "--resume must find cut/rounding.pth" in capsys.readouterr().err


def test_efforts_and_equalization_differ(here, capsys):
    states = []
    for told in (("--effort", "fast"), (), ("--equalize", "on")):
        argv = ("ptq", "--policy", "p.yaml", "--num-calib", "16", "--force", "-o", "r", *told)
        assert main([*argv, "--json"]) == 0
        metrics = json.loads(capsys.readouterr().out)
        states.append(state("r"))
    assert metrics["equalized"] > 0
    for one, other in ((0, 1), (1, 2)):
        assert any(not torch.equal(v, states[other][k]) for k, v in states[one].items())


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        ("--effort heroic", "'fast', 'good', 'best'"),
        ("--equalize maybe", "'auto', 'on', 'off'"),
        ("--iterations 0", "--iterations"),
        ("--memory-mb 0", "--memory-mb"),
    ],
)
def test_bad_options_end_with_2_and_write_nothing(here, capsys, argv, wanted):
    assert main(["ptq", "--policy", "p.yaml", "-o", "r", *argv.split()]) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert "Traceback" not in err
    assert not Path("r").exists()


class Ten(nets.Attention):
    """A small vision transformer of ten classes, for `--model module:factory`."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 10)


def test_dynamic_reaches_the_policy_the_file_and_its_certificate(here, capsys):
    """A transformer from a factory: what --dynamic chose is in ptq.pth and in model.onnx."""
    info = ModelInfo(arch="test_ptq_command:Ten", classes=10, input=(3, 12, 12), normalize="none")
    torch.manual_seed(0)
    save_model(Path("vit.pth"), Ten(), info=info, data="digits")
    named = {"model": info.replace(checkpoint="vit.pth")}
    data = Policy().data.replace(name="digits")
    Path("v.yaml").write_text(Policy().replace(**named, data=data).to_yaml())
    argv = ["ptq", "--policy", "v.yaml", "--dynamic", "--num-calib", "16", "-o", "vit", "--json"]
    assert main([*argv, "--trust-code", info.arch]) == 0
    assert json.loads(capsys.readouterr().out)["dynamic"] == 5
    policy = Policy.from_yaml(load_safe(Path("vit/ptq.pth"))["policy"])
    assert sum(str(e.activation) == "uint8/dynamic" for e in policy.layers) == 5
    assert main(["export", "vit/ptq.pth", "--num-test", "20"]) == 0
    rows = json.loads(Path("vit/certificate.json").read_text())["layers"]
    executed = {r["name"]: r["executed"] for r in rows if r["asked"] == "W8A8 dynamic"}
    assert len(executed) == 5
    assert set(executed.values()) == {"DynamicQuantizeMatMul"}


def test_the_form_of_16_bit_layers_goes_into_the_result(here, capsys):
    policy = Policy.from_yaml(Path("p.yaml").read_text())
    wide = policy.replace(default=Policy.uniform(16).default)
    Path("w.yaml").write_text(wide.to_yaml())
    argv = ["ptq", "--policy", "w.yaml", "--effort", "fast", "--num-calib", "24"]
    assert main([*argv, "-o", "exact", "--int16-form", "exact"]) == 0
    told = load_safe(Path("exact/ptq.pth"))["policy"]
    assert Policy.from_yaml(told).default.activation == ROUNDED_16
    assert any(name.startswith("quantizers.") for name in state("exact"))
    assert main([*argv, "-o", "fast"]) == 0
    assert not any(name.startswith("quantizers.") for name in state("fast"))
    trained = ["qat", "--policy", "w.yaml", "-o", "trained", "--epochs", "1"]
    assert main([*trained, "--int16-form", "exact"]) == 0
    assert {n for n in state("trained", "qat") if n.startswith("quantizers.")} == {
        n for n in state("exact") if n.startswith("quantizers.")
    }
    capsys.readouterr()
    assert main(["export", "exact/ptq.pth", "--onnx", "-o", "exact"]) == 0
    assert "W16A16 exact" in Path("exact/certificate.json").read_text()
