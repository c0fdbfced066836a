"""A profile from elsewhere: the folder that is written, run by its own program, and read again."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import nets
import onnx
import pytest
import torch

import mpq
from mpq.cli import main
from mpq.errors import UsageError
from mpq.export import foreign, probe, runtime
from mpq.export import profile as measuring
from mpq.export.pieces import COPIES
from mpq.latency import LatencyProfile
from mpq.pipeline.analyzing import warn_elsewhere
from mpq.targets import get_target

MODEL = "from nets import Plain\ndef plain(): return Plain()\nplain.input_size = (3, 16, 16)\n"
TELL = ["profile", "plain.pth", "--model", "small_nets:plain"]
WEB = foreign.home() / "node" / "node_modules" / "onnxruntime-web"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a checkpoint and a probe of it that was run."""
    folder = tmp_path_factory.mktemp("elsewhere")
    torch.save(nets.build("plain").state_dict(), folder / "plain.pth")
    (folder / "small_nets.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        assert main([*TELL, "--export-probe", "probe"]) == 0
    settings = json.loads((folder / "probe" / "probe.json").read_text())
    settings["runs"] = 3
    (folder / "probe" / "probe.json").write_text(json.dumps(settings))
    command = [sys.executable, str(folder / "probe" / "probe.py")]
    subprocess.run(command, check=True, capture_output=True, cwd="/")
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    return place


def graph() -> mpq.QuantGraph:
    return mpq.to_float(nets.build("plain"), torch.zeros(2, 3, 16, 16))


def test_what_was_measured_is_read_into_a_profile(here: Path, capsys):
    argv = [*TELL, "--import", "probe", "--target", "arm64", "--force", "--json"]
    assert main(argv) == 0
    told = json.loads(capsys.readouterr().out)
    found = LatencyProfile.load(here / "runs" / "plain" / "profile.json")
    assert told["target"] == found.target == "onnxruntime-arm64"
    assert list(found.layers) == list(graph().layers)
    assert all(cost.integer_ms > 0 and cost.float_ms > 0 for cost in found.layers.values())
    assert found.runtime == f"onnxruntime {runtime.version()}"
    ms = json.loads((here / "probe" / "result.json").read_text())["ms"]
    assert found.predict(dict.fromkeys(found.layers, True)) == pytest.approx(ms[0])
    assert found.predict(dict.fromkeys(found.layers, False)) == pytest.approx(ms[1])


def test_a_piece_computes_its_layer_as_the_whole_does(here: Path):
    files = json.loads((here / "probe" / "probe.json").read_text())["files"]
    names = [f for f in files if f.startswith("integer")]
    assert len(names) == len([f for f in files if f.startswith("float")]) == len(graph().layers)
    for name in names:
        model = onnx.load(here / "probe" / name)
        assert len(model.graph.node) % COPIES == 0
        produced = [out for node in model.graph.node for out in node.output if out]
        assert len(set(produced)) == len(produced)
    whole = measuring.four_files(graph())[0]
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3)).numpy()
    wanted, value = runtime.run(runtime.session(whole), x), {}
    for name in names:  # the net is a chain: what a piece gives, later ones take
        loaded = runtime.session(here / "probe" / name, optimize=False)
        feeds = {one.name: value.get(one.name, x) for one in loaded.get_inputs()}
        outputs = [one.name for one in loaded.get_outputs()]
        value |= dict(zip(outputs, loaded.run(outputs, feeds), strict=True))
    assert (value[outputs[-1]].reshape(wanted.shape) == wanted).all()


def test_a_result_of_something_else_is_refused(here: Path, tmp_path: Path, capsys):
    told = json.loads((here / "probe" / "result.json").read_text())
    other = tmp_path / "result.json"
    for change, said in (
        ({"key": "0"}, "a probe of another network"),
        ({"ms": told["ms"][:-1]}, "must be what probe.py wrote. Cannot read it: ValueError"),
        ({"ms": [float("nan"), *told["ms"][1:]]}, "must be finite milliseconds"),
        ({"threads": "two"}, "must be what probe.py wrote"),
    ):
        other.write_text(json.dumps({**told, **change}))
        with pytest.raises(UsageError, match=said):
            probe.read_result(graph(), other)
    other.write_text("[]")
    with pytest.raises(UsageError, match=r"must be what probe\.py wrote"):
        probe.read_result(graph(), other)
    assert main([*TELL, "--import", str(tmp_path / "gone")]) == 2
    assert "Run probe.py of the folder on the device first" in capsys.readouterr().err
    assert main([*TELL, "--export-probe", "probe"]) == 2
    assert "probe.json exists already" in capsys.readouterr().err


def test_targets_that_cannot_be_measured_here(here: Path, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.setenv("MPQ_RUNTIMES", str(tmp_path))
    assert main([*TELL, "--target", "arm64", "-o", str(tmp_path / "run")]) == 2
    assert "must come from such a computer" in capsys.readouterr().err
    assert main([*TELL, "--target", "wasm", "-o", str(tmp_path / "run")]) == 2
    assert "mpq portability --install web" in capsys.readouterr().err


def test_a_policy_for_another_target_than_was_measured_is_told(here: Path, caplog):
    found = probe.read_result(graph(), here / "probe", target="onnxruntime-arm64")
    with caplog.at_level(logging.WARNING):
        warn_elsewhere(found, get_target("arm64,wasm"))
        assert not caplog.records
        warn_elsewhere(found, get_target("wasm"))
    assert "was measured for onnxruntime-arm64, the policy is for onnxruntime-wasm" in caplog.text


def test_the_probe_runs_on_an_emulated_arm(here: Path, tmp_path: Path):
    try:
        there = foreign.of_target(get_target("arm64"))
    except UsageError as error:
        pytest.skip(str(error))
    shutil.copytree(here / "probe", tmp_path, dirs_exist_ok=True)
    foreign.start(there, tmp_path, "probe")
    found = probe.read_result(graph(), tmp_path)
    assert found.target == "onnxruntime-arm64"
    assert all(cost.integer_ms > 0 for cost in found.layers.values())


@pytest.mark.skipif(not WEB.is_dir(), reason="mpq portability --install web")
def test_webassembly_is_measured_in_node():
    found = probe.profile_there(graph(), get_target("wasm"), runs=3)
    assert found.target == "onnxruntime-wasm"
    assert found.runtime.startswith("onnxruntime-web 1.")
    assert all(cost.integer_ms > 0 and cost.float_ms > 0 for cost in found.layers.values())
