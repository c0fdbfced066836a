"""Code that a file asks for is run by no command, unless the user has named it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from mpq.checkpoint import load_safe
from mpq.cli import main
from mpq.policy import Policy


def checkpoint(key: str, value: str) -> None:
    content = load_safe("model.pth")
    if key == "arch":
        content["info"]["arch"] = value
    else:
        content["data"] = value
    torch.save(content, "model.pth")


def policy(key: str, value: str) -> None:
    path = Path("r/policy.yaml")
    path.write_text(_changed(Policy.load(path), key, value).to_yaml())


def quantized(key: str, value: str) -> None:
    content = load_safe("r/ptq.pth")
    changed = _changed(Policy.from_yaml(content["policy"]), key, value)
    torch.save({**content, "policy": changed.to_yaml()}, "r/ptq.pth")
    Path("r/origins.json").unlink()  # whoever makes a run can make it say anything


def _changed(found: Policy, key: str, value: str) -> Policy:
    if key == "arch":
        assert found.model is not None
        return found.replace(model=found.model.replace(arch=value))
    return found.replace(data=found.data.replace(name=value))


def onnx_file(key: str, value: str) -> None:
    model = onnx.load("r/model.onnx")
    entry = next(p for p in model.metadata_props if p.key == "mpq")
    told = json.loads(entry.value)
    if key == "arch":
        told["policy"]["model"]["arch"] = value
    else:
        told["policy"]["data"]["name"] = value
    entry.value = json.dumps(told)
    onnx.save(model, "r/model.onnx")


def ensemble(key: str, value: str) -> None:
    content = load_safe("ens.pth")
    if key == "arch":
        content["members"][0]["arch"] = value
    else:
        content["data"] = value
    torch.save(content, "ens.pth")


TRAIN = "train resnet20 --data digits -o new.pth --epochs 1"
ATTACKS: list[tuple[Callable[[str, str], None], str, str, bool]] = [
    # what the file says and where, the command, and whether it can do its work without
    (checkpoint, "arch", "analyze model.pth --data none -o s", False),
    (checkpoint, "data", "analyze model.pth --model mine:tiny -o s", False),
    (checkpoint, "arch", "profile model.pth -o s", False),
    (checkpoint, "arch", "rank model.pth --data digits -o s", False),
    (checkpoint, "data", "rank model.pth --trust-code mine:tiny -o s", False),
    (checkpoint, "arch", "ensemble model.pth --data digits -o e.pth", False),
    (checkpoint, "data", "ensemble model.pth --trust-code mine:tiny -o e.pth", False),
    (checkpoint, "arch", f"{TRAIN} --teacher model.pth", False),
    (checkpoint, "arch", "qat --policy r --teacher model.pth --epochs 1 --force", False),
    (ensemble, "arch", f"{TRAIN} --teacher ens.pth", False),
    (ensemble, "arch", "qat --policy r --teacher ens.pth --epochs 1 --force", False),
    (ensemble, "data", "ensemble ens.pth --trust-code mine:tiny -o e.pth", False),
    (policy, "arch", "ptq --policy r --force", False),
    (policy, "data", "ptq --policy r --force", False),
    (policy, "arch", "qat --policy r --epochs 1 --force", False),
    (policy, "data", "qat --policy r --epochs 1 --force", False),
    (policy, "arch", "diff r r", True),
    (quantized, "arch", "export r --force", False),
    (quantized, "data", "export r --force", False),
    (quantized, "arch", "verify r", False),
    (quantized, "data", "verify r", False),
    (onnx_file, "data", "bench r/model.onnx --runs 2", False),
    (onnx_file, "data", "verify r --exact", True),  # on noise
    (onnx_file, "arch", "certify r/model.onnx", True),
    (onnx_file, "arch", "bench r/model.onnx --data none --runs 2", True),
    (onnx_file, "data", "report r", True),
]


@pytest.mark.parametrize(
    ("attack", "key", "command", "harmless"),
    [pytest.param(*a, id=f"{a[0].__name__} {a[1]}: {a[2]}") for a in ATTACKS],
)
def test_a_file_runs_no_code(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    attack: Callable[[str, str], None],
    key: str,
    command: str,
    harmless: bool,
) -> None:
    attack(key, "evil:tiny" if key == "arch" else "evil:images")
    capsys.readouterr()
    code = main(command.split())
    told = capsys.readouterr().err
    assert not Path("RAN").exists()
    assert "evil" not in sys.modules
    assert code == (0 if harmless else 2), told
    assert harmless or "--trust-code evil:" in told
    assert "Traceback" not in told


@pytest.mark.parametrize("name", ["sys:exit", "os:_exit", "evil:x; rm -rf ~", "../evil:tiny"])
def test_names_of_what_is_there_already_are_not_called(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    checkpoint("arch", name)
    assert main(["analyze", "model.pth", "--data", "none", "-o", "s"]) == 2
    told = capsys.readouterr().err
    typed = f"add --trust-code {name}." in told
    assert typed == (name in ("sys:exit", "os:_exit"))  # others are no names, and cannot be typed
    assert not Path("s").exists()


def test_code_that_ends_the_process_is_a_failure(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["analyze", "model.pth", "--model", "sys:exit", "--data", "none"]) == 2
    assert "SystemExit" in capsys.readouterr().err


def test_what_is_trusted_once_is_remembered_in_the_run(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy("data", "evil:images")
    ptq = ["ptq", "--policy", "r", "--effort", "fast", "--num-calib", "16", "--force"]
    assert main(ptq) == 2
    assert main([*ptq, "--trust-code", "evil:images"]) == 0
    del sys.modules["evil"]
    assert main(ptq) == 0  # not asked again
    assert main(["export", "r", "--force", "--num-test", "0"]) == 0
    Path("evil.py").write_text(Path("evil.py").read_text() + "# another\n")
    capsys.readouterr()
    assert main(ptq) == 2
    told = capsys.readouterr().err
    assert "evil.py has changed since evil:images was trusted" in told
    assert "--trust-code evil:images" in told


@pytest.mark.parametrize("file", ["far.py", "far/__init__.py"])
def test_code_that_is_not_found_from_here_is_not_said_to_have_changed(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    Path("far").mkdir()
    Path(file).write_text(Path("evil.py").read_text())
    policy("data", "far:images")
    ptq = ["ptq", "--effort", "fast", "--num-calib", "16", "--force"]
    assert main([*ptq, "r", "--trust-code", "far:images"]) == 0
    del sys.modules["far"]
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(here))])
    capsys.readouterr()
    assert main([*ptq, "../r", "--trust-code", "mine:tiny"]) == 2
    told = capsys.readouterr().err
    assert "the module far of far:images must be importable from this folder" in told
    assert f"lay in {here / file}: start mpq in {here}, or" in told


def test_trust_that_came_with_the_run_counts_for_nothing(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody who makes a run can write any `trusted.json`, but not with this user's seal."""
    policy("data", "evil:images")
    told = json.loads(Path("r/trusted.json").read_text())
    told["evil:images"] = told["mine:images"]
    Path("r/trusted.json").write_text(json.dumps(told))
    assert main(["ptq", "--policy", "r", "--force"]) == 2
    monkeypatch.setenv("XDG_STATE_HOME", "elsewhere")
    policy("data", "mine:images")
    capsys.readouterr()
    assert main(["ptq", "--policy", "r", "--force"]) == 2
    assert "--trust-code mine:" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, "[]", '{"mine:images": 3}', '{"mine:images": {}}']
)
def test_a_memory_that_is_damaged_is_none(here: Path, text: str) -> None:
    Path("r/trusted.json").write_text(text)
    assert main(["ptq", "--policy", "r", "--force"]) == 2
    named = ["--trust-code", "mine:tiny", "--data", "mine:images"]
    assert main(["ptq", "--policy", "r", "--force", "--effort", "fast", *named]) == 0
    assert set(json.loads(Path("r/trusted.json").read_text())) == {"mine:tiny", "mine:images"}
