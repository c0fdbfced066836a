"""What a newcomer trips over: each step that once failed, or misled, is a test."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from jsonkeys import documented, keys
from nets import MINE
from rich.console import Console

from mpq import origins, rundir
from mpq.cli import COMMANDS as COMMANDS_OF_CLI
from mpq.cli import cli, main, places, terminal
from mpq.data import DataSource
from mpq.pipeline.demo import DemoRow
from mpq.pipeline.quantizing import load_quantized
from mpq.policy import Policy
from mpq.userimport import trusting

NAMED = ["--model", "newcomers:tiny", "--data", "newcomers:images"]
QAT = ["--epochs", "1", "--set", "batch=32"]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def project(once: Any) -> Iterator[Path]:
    """`runs/a` with all stages, exported from `qat.pth`; `runs/b`, used later, with a policy."""

    def make(folder: Path) -> None:
        (folder / "newcomers.py").write_text(MINE)
        train = ["train", "newcomers:tiny", "--data", "newcomers:images", "--epochs", "1"]
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as told:
            patch.setenv("XDG_STATE_HOME", str(folder / "state"))
            assert main([*train, "-o", "model.pth", "--json"]) == 0
            Path("train.json").write_text(told.getvalue())
            assert main(["analyze", "model.pth", *NAMED, "--num-calib", "16", "-o", "runs/a"]) == 0
            assert main(["ptq", "--num-calib", "16", "--effort", "fast"]) == 0
            assert main(["qat", "runs/a", *QAT]) == 0
            assert main(["export", "--num-test", "10"]) == 0
            assert main(["analyze", "model.pth", *NAMED, "--num-calib", "16", "-o", "runs/b"]) == 0

    yield once("newcomers", make)
    sys.modules.pop("newcomers", None)


@pytest.fixture
def here(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project, as working directory."""
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "p" / "state"))
    return tmp_path / "p"


def say(capsys: Capture, command: str) -> tuple[str, str]:
    """Run a command that must succeed; what it wrote to stdout and stderr."""
    code = main(command.split())
    out, err = capsys.readouterr()
    assert code == 0, err
    return out, err


def fails(capsys: Capture, command: str) -> str:
    """Run a command that must fail with one message."""
    code = main(command.split())
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    return err


# -- one truth per run -----------------------------------------------------------------------------


def test_each_stage_has_a_file_of_its_own_and_export_says_which_it_took(
    here: Path, capsys: Capture
) -> None:
    model = Path("runs/a/model.onnx")
    assert origins.made_of(model, rundir.QUANTIZED) == "qat.pth"  # it was made last
    for stage, trained in (("qat", True), ("ptq", False)):
        say(capsys, "report runs/a")
        page = Path("runs/a/report.html").read_text()
        assert ('id="training"' in page) == trained
        assert f"{stage}.pth" in page
        if trained:
            out, err = say(capsys, "export runs/a --from ptq --num-test 5 --force --json")
            assert json.loads(out)["from"] == "runs/a/ptq.pth"
            assert "wrote runs/a/model.onnx from runs/a/ptq.pth" in err
    assert origins.made_of(model, rundir.QUANTIZED) == "ptq.pth"
    assert "name two networks" in fails(capsys, "export runs/a/ptq.pth --from qat")
    assert "runs/b must hold a quantized network" in fails(capsys, "export runs/b")
    assert "but has no qat.pth. Run `mpq qat`" in fails(capsys, "export runs/b --from qat")
    err = fails(capsys, "bench runs/a/qat.pth --data none")
    assert "runs/a/model.onnx was not made from runs/a/qat.pth" in err


def test_weights_of_a_training_are_shown_as_they_are(here: Path, capsys: Capture) -> None:
    """The page held the checkpoint's weights against the steps that training had learned."""
    say(capsys, "report runs/a")
    assert "mpq qat runs/a --epochs 1" in Path("runs/a/report.html").read_text()
    with trusting("newcomers:tiny"):
        module = load_quantized(Path("runs/a/qat.pth"), DataSource("none")).module
    for row in json.loads(Path("runs/a/ranges.json").read_text())["layers"]:
        layer = module.get_submodule(row["layer"])
        steps = layer.weight.detach().flatten(1) / layer.step().detach().reshape(-1, 1)
        told = row["weight"]["low"], row["weight"]["high"]
        assert told == pytest.approx((steps.min().item(), steps.max().item()), rel=1e-4)


def test_the_newest_stage_is_the_last_made_wherever_the_run_is_copied(
    here: Path, capsys: Capture
) -> None:
    say(capsys, "ptq runs/a --num-calib 16 --effort fast --force")
    for name in ("qat.pth", "ptq.pth"):  # as a copy may leave them
        os.utime(Path("runs/a", name))
    os.utime("runs/a/qat.pth", (2e9, 2e9))
    assert origins.newest(Path("runs/a"), rundir.QUANTIZED) == Path("runs/a/ptq.pth")


def test_a_stage_that_is_stale_is_not_taken(here: Path, capsys: Capture) -> None:
    kept = Path("runs/a/policy.yaml").read_text()
    Path("runs/a/policy.yaml").write_text(kept.replace("int8/channel", "int6/channel", 1))
    say(capsys, "ptq runs/a --num-calib 16 --effort fast --force")
    err = fails(capsys, "verify runs/a")
    assert "runs/a/qat.pth is stale" in err
    assert "Or take runs/a/ptq.pth, which is not stale: mpq export runs/a --force" in err
    Path("runs/a/policy.yaml").write_text(kept)
    assert origins.newest(Path("runs/a"), rundir.QUANTIZED) == Path("runs/a/qat.pth")
    assert "runs/a/ptq.pth is stale" in fails(capsys, "export runs/a --from ptq --force")


def test_a_run_of_the_version_before_is_read_with_a_warning(
    here: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("ptq.pth", "qat.pth", "model.onnx", "certificate.json", "origins.json"):
        path = Path("runs/a", name)
        path.rename("runs/a/quantized.pth") if name == "ptq.pth" else path.unlink()
    path = places.quantized(None, None)
    assert "no file named: using runs/a/quantized.pth" in capsys.readouterr().err
    with trusting("newcomers:tiny"):
        assert load_quantized(path, DataSource("none")).metrics["stage"] == "ptq"
    assert "runs/a/quantized.pth is as mpq 0.1 named what ptq and qat wrote" in caplog.text


COMMANDS = {
    "ptq runs/a --effort fast --num-calib 16 --force": "ptq.pth",
    "qat runs/a/sensitivity.json --epochs 1 --set batch=32 --force": "qat.pth",
    "export runs/a/policy.yaml --num-test 5 --force": "model.onnx",
    "verify runs/a/qat.pth --num-test 5": "verify.json",
    "verify runs/a/certificate.json --exact": "exact.json",
    "certify runs/a/sensitivity.png": "",
    "bench runs/a/metrics.jsonl --runs 1 --data none": "bench.jsonl",
    "report runs/a/model.onnx": "report.html",
}
SAID: dict[str, dict[str, object]] = {
    "ptq": {"stage": "ptq"},
    "qat": {"epochs": 1},
    "export": {"integer_macs_fraction": 1.0},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_a_run_or_a_file_in_it(
    here: Path, capsys: Capture, command: str
) -> None:
    name, page = COMMANDS[command], documented()
    (here / "runs" / "a" / name).unlink() if name in ("verify.json", "model.onnx") else None
    out, err = say(capsys, f"{command} --json")
    assert "no file named" not in err
    assert not name or Path("runs/a", name).is_file()
    told, verb = json.loads(out), command.split()[0] + " --exact" * ("--exact" in command)
    assert keys(told) == page[verb]
    assert SAID.get(verb, {}).items() <= told.items()


@pytest.mark.parametrize("form", ["runs/a", "runs/a/qat.pth", "runs/a/policy.yaml", ""])
def test_a_network_is_that_of_a_run_as_well(here: Path, capsys: Capture, form: str) -> None:
    shutil.rmtree("runs/b")
    assert "runs/a/policy.yaml exists already" in fails(capsys, f"analyze {form}".strip())[-200:]
    before = Policy.load("runs/a/policy.yaml")
    out, err = say(capsys, f"analyze {form} --effective-bits 6 -o runs/six --json")
    told = json.loads(out)
    assert told["effective_bits"] <= 6
    assert told["file"] == "runs/six/policy.yaml"
    assert keys(told) <= documented()["analyze"]
    made = Policy.load("runs/six/policy.yaml")
    assert (made.model, made.data) == (before.model, before.data)
    assert made.constraints.effective_bits == 6
    assert ("no run named: using runs/a" in err) == (not form)
    if form in ("runs/a/qat.pth", ""):
        say(capsys, f"analyze {form or 'runs/a'} --force")  # its budget, its scores
        assert Policy.load("runs/a/policy.yaml").constraints == before.constraints
    assert origins.doubt(Path("runs/a/model.onnx")) is None


def test_floats_are_said_to_be_normalized_and_are_measured_on(
    here: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    """As a newcomer's Dataset gives them behind ToTensor: --normalize was left aside in silence."""
    Path("floating.py").write_text(
        "import numpy as np\ndef images():\n"
        "    pair = np.ones((60, 3, 8, 8), np.float32), np.arange(60) % 10\n"
        "    return {'train': pair, 'validation': pair}\n"
    )
    model = "analyze model.pth --model newcomers:tiny --data floating:images --num-calib 16"
    say(capsys, f"{model} --normalize imagenet -o runs/f")
    told = "data floating:images are floats, taken as normalized (imagenet) already; uint8 pixels"
    assert told in caplog.text
    out, _ = say(capsys, "qat runs/f --epochs 1 --set batch=32 --json")
    assert json.loads(out)["validation_images"] == 6  # a tenth is held out
    assert json.loads(out)["float_top1"] is not None
    sys.modules.pop("floating", None)


def test_a_network_of_a_run_is_profiled_there(here: Path, capsys: Capture) -> None:
    out, _ = say(capsys, "profile runs/a/ptq.pth --json")
    assert keys(json.loads(out)) == documented()["profile"]
    assert Path("runs/a/profile.json").is_file()
    (here / "fast").mkdir()
    shutil.copy("runs/a/profile.json", "fast")
    assert "policy fast/policy.yaml does not exist" in fails(capsys, "profile fast")


def test_every_command_is_on_the_page_of_json() -> None:
    """Those of `rank` and `portability` are compared where these are run."""
    page = documented()
    assert {name.split()[0] for name in page} == COMMANDS_OF_CLI.keys() - {"completion", "schema"}
    assert page["demo"] == {"rows", *(field.name for field in fields(DemoRow))}


def test_what_is_made_and_compared_has_the_keys_of_the_page(here: Path, capsys: Capture) -> None:
    page = documented()
    trained = json.loads(Path("train.json").read_text())
    assert keys(trained) == page["train"]
    assert trained["file"] == "model.pth"
    ensemble = f"ensemble model.pth model.pth {' '.join(NAMED)} -o ens.pth --json"
    told = json.loads(say(capsys, ensemble)[0])
    assert keys(told) == page["ensemble"]
    assert [member["arch"] for member in told["members"]] == ["newcomers:tiny"] * 2
    say(capsys, "analyze runs/a --effective-bits 6 -o runs/six")
    assert keys(json.loads(say(capsys, "diff runs/a runs/six --json")[0])) == page["diff"]


def test_what_is_looked_at_has_the_keys_of_the_page(here: Path, capsys: Capture) -> None:
    page = documented()
    for command in ("diagnose runs/a", "targets", "cache", "doctor"):
        found = keys(json.loads(say(capsys, f"{command} --json")[0]))
        assert len(found) >= 3
        assert found <= page[command.split()[0]], command


@pytest.mark.parametrize("form", ["runs/a", "runs/a/certificate.json", "runs/a/qat.pth", ""])
def test_a_run_is_found_alike_in_every_form(here: Path, form: str) -> None:
    shutil.rmtree("runs/b")
    path = Path(form) if form else None
    for name in ("policy.yaml", "model.onnx"):
        assert places.in_run(path, name) == Path("runs/a", name)
    assert places.quantized(path, None) == Path("runs/a/qat.pth")
    assert places.quantized(None, "ptq") == Path("runs/a/ptq.pth")


def test_the_newest_run_is_named_and_does_not_move_when_an_old_one_is_looked_at(
    here: Path, capsys: Capture
) -> None:
    for command in ("certify runs/a", "report runs/a", "diff runs/a runs/b"):  # fmt: skip
        say(capsys, command)
    assert rundir.last_run() == Path("runs/b")
    _, err = say(capsys, "certify")
    assert "runs/b, the run used last, has no model.onnx" in err
    assert "no file named: using runs/a/model.onnx" in err


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("train broken:net --data digits -o t.pth", "broken.py:5: `return helper()`"),
        ("train resnet8 --data broken:images -o t.pth", "broken.py:8: `raise OSError('no disk')`"),
        ("train broken_too:net --data digits -o t.pth", "broken_too.py:1: `import no_such_thing`"),
    ],
)
def test_what_fails_in_code_of_the_users_is_shown_by_its_line(
    here: Path, capsys: Capture, command: str, line: str
) -> None:
    Path("broken.py").write_text(
        "from functools import partial\n\nhelper = partial(int, 'four')\n"
        "def net():\n    return helper()\n\ndef images():\n    raise OSError('no disk')\n"
    )
    Path("broken_too.py").write_text("import no_such_thing\n")
    try:
        assert line in fails(capsys, command)
    finally:
        sys.modules.pop("broken", None)


@pytest.mark.parametrize("command", COMMANDS_OF_CLI)
def test_help_fits_a_terminal_of_80_columns(command: str) -> None:
    found = cli.get_command(click.Context(cli), command)
    assert found is not None
    context = click.Context(found, info_name=f"mpq {command}", terminal_width=80)
    assert [line for line in found.get_help(context).splitlines() if len(line) > 80] == []


def test_lines_fit_a_terminal_of_80_columns(
    here: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("stdout", "stderr"):
        wide = {"width": 80, "force_terminal": True, "color_system": None, "highlight": False}
        monkeypatch.setattr(terminal, name, Console(stderr=name == "stderr", **wide))
    for command in ("certify runs/a", "verify runs/a --num-test 5", "diagnose runs/a",
                    "diff runs/a runs/b", "bench runs/a --runs 1 --data none",
                    "ptq runs/b --num-calib 16 --effort fast", "report runs/a"):  # fmt: skip
        text = re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", "".join(say(capsys, command)))
        lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
        assert [line for line in lines if len(line) > 80] == [], command


def test_no_colours_without_a_terminal(here: Path) -> None:
    env = {**os.environ, "TERM": "xterm-256color"}
    argv = [sys.executable, "-m", "mpq", "diff", "runs/a", "runs/b", "-v"]
    done = subprocess.run(argv, capture_output=True, env=env, check=True)
    assert b"\x1b" not in done.stdout + done.stderr
