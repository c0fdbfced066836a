"""Nothing stale is believed: what was made from something else is refused, with what mends it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import onnx
import pytest
import torch

from mpq import origins
from mpq.checkpoint import load_model, save_model
from mpq.cli import main
from mpq.errors import UsageError
from mpq.pipeline import quantizing
from mpq.policy import Policy
from mpq.userimport import trusting

FAST = ["--num-calib", "16", "--effort", "fast", "--force"]
PTQ = ["ptq", "--policy", "r", *FAST]
EXPORT = ["export", "r", "--num-test", "10", "--force"]
USES = [
    "export r --force",
    "verify r",
    "verify r --exact",
    "certify r",
    "certify r/model.onnx",
    "bench r --runs 2",
    "bench r/model.onnx --data none --runs 2",
]


def edit(path: str = "r/policy.yaml") -> None:
    """As a person does: the default at other bits."""
    Path(path).write_text(Path(path).read_text().replace("int8/channel", "int6/channel", 1))


def refused(capsys: pytest.CaptureFixture[str], command: str) -> str:
    capsys.readouterr()
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert "is stale" in told, told
    return told


def left_out(page: str) -> set[str]:
    """Files that a report names as stale."""
    return set(re.findall(r"\br/([\w.]+) is stale", page))


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", "r"]) == 0
    capsys.readouterr()
    return Path("r/report.html").read_text()


NOT_MADE = {
    "qat.pth",
    "quantized.pth",
    "validation.json",
    "metrics.jsonl",
    "exact.json",
    "portability.json",
    "demo.json",
    "ranges.json",
    "diagnosis.json",
}
"""Files that the commands of the run here do not write."""


@pytest.mark.usefixtures("here")
def test_every_file_says_what_it_was_made_from() -> None:
    known, model = origins.origins(Path("r")), Policy.load("r/policy.yaml").model
    assert model is not None
    for name in origins.AGAIN.keys() - NOT_MADE:
        assert known[name].sha256 == origins.identity(Path("r", name))
        assert known[name].made_from["weights"] == model.sha256
        assert origins.doubt(Path("r", name)) is None
    assert known["verify.json"].made_from["ptq.pth"] == known["ptq.pth"].sha256
    assert known["ptq.pth"].made_from["data"] == "mine:images, 16 images, seed 0"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("command", USES)
def test_an_edited_policy_makes_stale_what_was_made_from_it(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit()
    told = refused(capsys, command)
    assert "r/ptq.pth is stale: mpq ptq made it when r/policy.yaml had the hash " in told
    assert "mpq ptq r --force" in told


@pytest.mark.usefixtures("here")
def test_the_commands_that_a_refusal_names_mend_it(capsys: pytest.CaptureFixture[str]) -> None:
    edit()
    assert main(PTQ) == 0
    told = refused(capsys, "verify r")
    assert "r/model.onnx is stale: mpq export made it when r/ptq.pth had the hash" in told
    assert "mpq export r --force" in told
    page = shown(capsys)
    assert left_out(page) == {"model.onnx"}  # and so all that is said of it
    assert page.count(" is stale") >= 3  # certificate, verification and bench at least
    assert "MACs that run as integers" not in page
    assert main(EXPORT) == 0
    assert not Path("r/bench.jsonl").exists()
    for command in ("verify r --num-test 5", "bench r --runs 2"):
        assert main(command.split()) == 0
    for name in ("certificate.json", "verify.json", "bench.jsonl"):
        assert origins.doubt(Path("r", name)) is None


@pytest.mark.usefixtures("here")
def test_words_in_a_policy_make_nothing_stale() -> None:
    path = Path("r/policy.yaml")
    found = Policy.load(path)
    layers = tuple(layer.replace(reason="a word", locked=True) for layer in found.layers)
    path.write_text("# a comment\n" + found.replace(layers=layers, evidence={}).to_yaml())
    origins.require(Path("r/model.onnx"))
    edit()
    with pytest.raises(UsageError, match=r"r/ptq\.pth is stale"):
        origins.require(Path("r/model.onnx"))


def other_network() -> None:
    with trusting("mine:tiny"):
        loaded = load_model("model.pth")
    with torch.no_grad():
        loaded.module[0].weight.mul_(1.5)
    save_model("other.pth", loaded.module, info=loaded.info, data="mine:images")


@pytest.mark.usefixtures("here")
def test_another_network_makes_all_of_a_run_stale(capsys: pytest.CaptureFixture[str]) -> None:
    other_network()
    named = ["--model", "mine:tiny", "--num-calib", "16", "-o", "r", "--force"]
    assert main(["analyze", "other.pth", *named]) == 0
    for command in USES:
        assert "mpq ptq r --force" in refused(capsys, command)
    page = shown(capsys)
    assert "Sensitivity" in page
    assert left_out(page) == {"ptq.pth", "float.onnx"}
    assert page.count(" is stale") >= 3


@pytest.mark.usefixtures("here")
def test_a_run_takes_no_file_of_another_network(capsys: pytest.CaptureFixture[str]) -> None:
    other_network()
    named = ["--model", "mine:tiny", "--data", "mine:images", "--num-calib", "16", "-o", "s"]
    assert main(["analyze", "other.pth", *named]) == 0
    capsys.readouterr()
    assert main([*EXPORT, "-o", "s"]) == 2
    told = capsys.readouterr().err
    assert "s/policy.yaml (hash " in told
    assert not Path("s/model.onnx").exists()
    assert main(["ptq", "--policy", "s", *FAST]) == 0
    capsys.readouterr()
    assert main(["verify", "r", "--from", "s/ptq.pth"]) == 2
    told = capsys.readouterr().err
    assert "r/model.onnx was made from another network than the one it is compared with" in told
    shutil.copy("s/policy.yaml", "r/policy.yaml")  # of the other network, its scores left behind
    page = shown(capsys)
    assert left_out(page) == {"sensitivity.json", "ptq.pth", "float.onnx"}
    assert page.count(" is stale") >= 4


@pytest.mark.usefixtures("here")
def test_a_rerun_completes_what_is_incomplete(capsys: pytest.CaptureFixture[str]) -> None:
    export = EXPORT[:-1]
    assert main(export) == 2
    assert "r/model.onnx exists already" in capsys.readouterr().err
    Path("r/certificate.json").unlink()
    Path("r/float.onnx").unlink()
    origins.require(Path("r/float.onnx"))  # whoever wants it says that it is not there
    assert main(export) == 0
    assert Path("r/certificate.json").is_file()


@pytest.mark.usefixtures("here")
def test_nothing_to_resume_is_a_start() -> None:
    qat = ["qat", "--policy", "r", "-o", "s", "--epochs", "1", "--set", "batch=32", "--resume"]
    assert main(qat) == 0


@pytest.mark.usefixtures("here")
def test_a_proof_of_another_file_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    model = onnx.load("r/model.onnx")
    model.doc_string = "another"
    onnx.save(model, "r/model.onnx")
    assert main(["bench", "r", "--runs", "2"]) == 0  # the user's own file now
    content = json.loads(Path("r/verify.json").read_text())
    Path("r/verify.json").write_text(json.dumps({**content, "top1_agreement": 1.0}))
    page = shown(capsys)
    assert page.count("when r/model.onnx had the hash") == 1  # the certificate
    assert "r/verify.json is not what mpq wrote there" in page


@pytest.mark.usefixtures("here")
def test_a_run_of_before_is_believed(capsys: pytest.CaptureFixture[str]) -> None:
    Path("r/origins.json").unlink()
    page = shown(capsys)
    assert "Left out" not in page
    assert "MACs that run as integers" in page
    origins.require(Path("r/model.onnx"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"model.onnx": {}}', '{"a": 3}'])
def test_damaged_origins_are_told(text: str) -> None:
    Path("r/origins.json").write_text(text)
    with pytest.raises(UsageError, match=r"r/origins\.json is not what mpq writes there"):
        origins.require(Path("r/model.onnx"))


@pytest.mark.usefixtures("here")
def test_a_training_that_fails_leaves_the_run_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It used to replace the policy when it began, and so to contradict what is there."""

    def fails(*_: object) -> None:
        raise KeyboardInterrupt

    shutil.copy("r/policy.yaml", "p.yaml")
    edit("p.yaml")
    before = Path("r/policy.yaml").read_bytes()
    qat = ["qat", "--policy", "p.yaml", "-o", "r", "--epochs", "1", "--set", "batch=32"]
    with monkeypatch.context() as patch:
        patch.setattr("mpq.train.engine.Engine.train_epoch", fails)
        assert main([*qat, "--force"]) == 130
    assert Path("r/policy.yaml").read_bytes() == before
    assert main(["verify", "r"]) == 0
    assert main([*qat, "--resume"]) == 0
    assert Path("r/policy.yaml").read_bytes() == Path("p.yaml").read_bytes()
    assert origins.origins(Path("r"))["qat.pth"].by == "qat"
    assert "mpq export r --force" in refused(capsys, "verify r")


@pytest.mark.usefixtures("here")
def test_a_policy_edited_while_it_is_worked_on_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = quantizing.run_ptq

    def slow(*args: object) -> object:
        edit()
        return run(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("mpq.cli.ptq.run_ptq", slow)
    assert main(PTQ) == 0
    assert "int6/channel" in Path("r/policy.yaml").read_text()
    assert "mpq ptq r --force" in refused(capsys, "export r --force")
