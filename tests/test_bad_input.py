"""Every mistake ends with exit code 2, one message, and the folder as it was."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from mpq import zoo
from mpq.checkpoint import load_safe, save_model
from mpq.cli import main
from mpq.data import Normalization
from mpq.policy import ModelInfo
from mpq.spec import WIDTHS
from mpq.train.ensemble import Ensemble, Member, save_ensemble

MPQ = [sys.executable, "-c", "import sys; from mpq.cli import main; sys.exit(main())"]
SIZE = (3, 16, 16)
FAST = ("--epochs", "1", "--set", "batch=128")


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """`model.pth` (digits), `other.pth` (other weights), `five.pth` (5 classes), and runs/model."""
    folder = tmp_path_factory.mktemp("project")
    for name, classes, seed in (("model", 10, 0), ("other", 10, 1), ("five", 5, 2)):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = zoo.build("resnet8", classes)
        info = ModelInfo(arch="resnet8", classes=classes, input=SIZE, normalize="none")
        save_model(folder / f"{name}.pth", module, info=info, data="digits")
        member = Member(name, module, Normalization.parse("none"), None, "resnet8", classes, SIZE)
        save_ensemble(folder / f"ens-{name}.pth", Ensemble([member]))
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["analyze", "model.pth", "--num-calib", "16"]) == 0
        assert main(["ptq", "--effort", "fast", "--num-calib", "32"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(project, tmp_path, monkeypatch) -> Path:
    """A copy of the project, as working directory."""
    shutil.copytree(project, tmp_path / "p")
    monkeypatch.chdir(tmp_path / "p")
    return tmp_path / "p"


def listing(folder: Path) -> dict[str, str]:
    """Every file below a folder with its content's hash, and every folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        if p.is_file()
        else ""
        for p in sorted(folder.rglob("*"))
        if "__pycache__" not in p.parts
    }


@pytest.fixture
def fails(here, capsys):
    """Run a command that must fail; all of `told` must be in its one message."""

    def run(argv: str | list[str], *told: str) -> str:
        before = listing(here)
        code = main(argv.split() if isinstance(argv, str) else argv)
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        message = err.splitlines()[-1]
        assert message.startswith("error: "), err
        assert err.count("error: ") == 1
        for part in told:
            assert part in message
        assert len(message) < 1000
        assert listing(here) == before
        return message

    return run


def edit(**changes: object) -> None:
    """Write `p.yaml`: the policy of runs/model with other keys."""
    policy = yaml.safe_load(Path("runs/model/policy.yaml").read_text())
    Path("p.yaml").write_text(yaml.safe_dump({**policy, **changes}))


# -- files -----------------------------------------------------------------------------------------


def spoil(path: Path, how: str) -> None:
    """Make a file missing, empty, truncated or something else."""
    if how == "missing":
        path.unlink(missing_ok=True)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif how == "text":
        path.write_text("hello: [world\n")
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("a.txt", "hello")
        path.write_bytes(buffer.getvalue())


COMMANDS = {
    "model.pth": "analyze model.pth -o a",
    "runs/model/ptq.pth": "export runs/model/ptq.pth",
    "ens-model.pth": "qat --teacher ens-model.pth -o a",
    "m.onnx": "bench m.onnx --data none",
    "runs/model/policy.yaml": "ptq --policy runs/model/policy.yaml -o a",
}
HOWS = ("missing", "empty", "truncated", "text", "zip")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("file", COMMANDS)
def test_spoiled_files(here, fails, file, how):
    if file == "m.onnx":
        shutil.copy("model.pth", file)  # any bytes: bench must not trust the name
    if file.endswith(".yaml") and how == "truncated":
        Path(file).write_text(Path(file).read_text()[:150])
    else:
        spoil(Path(file), how)
    fails(COMMANDS[file], file)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("analyze ens-model.pth", "mpq/ensemble"),
        ("export model.pth", "model.pth must be a quantized network"),
        ("qat --teacher runs/model/ptq.pth -o a", "runs/model/ptq.pth"),
        ("ensemble runs/model/ptq.pth -o e.pth", "mpq/quantized"),
        ("ptq --policy model.pth -o a", "model.pth"),
        ("analyze runs", "must hold config.json"),
        ("export runs", "runs must hold a quantized network, but has no ptq.pth nor qat.pth"),
    ],
)
def test_files_of_another_kind(fails, command, told):
    fails(command, told)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format": "mpq/quantized", "version": 9}, "version must be 1. Got 9"),
        ({"policy": None}, "policy must be a str"),
        ({"state": {}}, "does not fit resnet8"),
        ({"state": {"conv1.bias": torch.tensor([torch.nan])}}, "conv1.bias must be a tensor"),
        ({"metrics": 1}, "metrics must be a dict"),
    ],
)
def test_quantized_files_with_wrong_content(here, fails, change, told):
    path = Path("runs/model/ptq.pth")
    torch.save({**torch.load(path), **change}, path)
    fails("export", "runs/model/ptq.pth", told)


# -- policies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"layer": []}, ["p.yaml", "layer is not a known key", "did you mean", "layers"]),
        ({"layers": [{"name": "conv1", "weigth": "int4/channel"}]}, ["did you mean weight"]),
        ({"layers": [{"name": "layer9.*"}]}, ["'layer9.*'", "matches none of its 8 layers"]),
        ({"layers": [{"name": "conv2", "weight": "int4/channel"}]}, ["did you mean", "conv1"]),
        ({"layers": [{"name": "conv1", "weight": "int9/channel"}]}, ["must be one of", "Got 9"]),
        ({"layers": [{"name": "conv1", "weight": "4 bits"}]}, ["'int4/channel'", "'4 bits'"]),
        (
            {"layers": [{"name": "conv1", "activation": "int8/tensor"}]},
            ["must be uint8/tensor at 8 bits", "Got int8/tensor"],
        ),
        ({"layers": [{"name": "conv1", "weight": "uint8/channel"}]}, ["must be signed"]),
        ({"target": "tensorrt"}, ["onnxruntime-cpu", "'tensorrt'"]),
        ({"version": 2}, ["version must be 1. Got 2"]),
        ({"model": None}, ["p.yaml", "must name the model"]),
    ],
)
def test_policies(here, fails, change, told):
    edit(**change)
    fails("ptq --policy p.yaml", *told)
    fails(["qat", "--policy", "p.yaml", *FAST], *told)


def with_model(**changes: object) -> None:
    model = yaml.safe_load(Path("runs/model/policy.yaml").read_text())["model"]
    edit(model={**model, **changes})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"checkpoint": "other.pth"}, ["p.yaml was made for other weights", "other.pth", "sha256"]),
        ({"checkpoint": "gone.pth"}, ["the checkpoint gone.pth", "does not exist"]),
        ({"checkpoint": ""}, ["p.yaml must name its checkpoint"]),
        ({"checkpoint": "five.pth"}, ["five.pth must have 10 classes", "5 outputs"]),
        ({"arch": "resnet21"}, ["'resnet21'", "did you mean resnet"]),
        ({"arch": "resnet32"}, ["model.pth: the weights must be those of resnet32"]),
        ({"normalize": "imagnet"}, ["'imagnet'", "did you mean imagenet"]),
        ({"classes": 0}, ["model.classes", "Got 0"]),
    ],
)
def test_the_model_of_a_policy(here, fails, change, told):
    with_model(**change)
    fails("ptq --policy p.yaml", *told)


def test_a_run_holds_one_policy(here, fails):
    edit(layers=[])
    fails("ptq --policy p.yaml -o runs/model --force --data none")  # force replaces, data fails
    Path("runs/model/ptq.pth").unlink()
    fails(
        "ptq --policy p.yaml -o runs/model", "runs/model/policy.yaml is another policy", "--force"
    )


# -- models ----------------------------------------------------------------------------------------


def test_unknown_architectures(fails):
    fails("train resnet21 --data digits -o t.pth", "'resnet21'", "did you mean resnet")
    fails("analyze model.pth --model mobilenetv2 -o a", "'mobilenetv2'", "mobilenet_v2")
    fails("train nowhere:net --data digits -o t.pth", "'nowhere'", "importable")


def test_classes_that_do_not_match(fails):
    fails("analyze five.pth -o a", "5", "10", "classes")
    fails("ensemble model.pth five.pth -o e.pth --data digits", "classes")
    fails(["qat", "--teacher", "ens-five.pth", "-o", "a"], "teacher five", "10 classes", "Got 5")
    argv = ["train", "resnet8", "--data", "digits", "--teacher", "ens-five.pth", "-o", "s.pth"]
    fails(argv, "teacher five", "10 classes", "Got 5")


def test_nan_in_the_weights(here, fails):
    content = torch.load("model.pth")
    content["state"]["layer2.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(content, "nan.pth")
    fails("analyze nan.pth", "layer2.0.conv1.weight", "nan.pth", "1 of its 4608 values")
    with_model(checkpoint="nan.pth")
    fails("ptq --policy p.yaml", "layer2.0.conv1.weight")
    fails(["qat", "--teacher", "nan.pth", "-o", "a"], "layer2.0.conv1.weight")


UNTRACEABLE = """
import torch

class Net(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.linear = torch.nn.Linear(3, classes)

    def forward(self, x):
        x = x.mean((2, 3))
        if x.sum() > 0:
            x = x + 1
        return self.linear(x)

def net(classes):
    return Net(classes)
"""


def test_an_untraceable_model(here, fails):
    name = f"untraceable_{os.getpid()}"
    Path(f"{name}.py").write_text(UNTRACEABLE)
    state = {"linear.weight": torch.zeros(10, 3), "linear.bias": torch.zeros(10)}
    torch.save(state, "u.pth")
    argv = ["analyze", "u.pth", "--model", f"{name}:net", "--data", "none"]
    try:
        fails(argv, f"{name}.py:11", "if x.sum() > 0:", "torch.where")
    finally:
        sys.modules.pop(name, None)


# -- data ------------------------------------------------------------------------------------------


def test_data_that_are_needed_and_not_there(here, fails, monkeypatch):
    monkeypatch.delenv("MPQ_DATA", raising=False)
    torch.save(torch.load("model.pth")["state"], "foreign.pth")
    fails("analyze foreign.pth", "foreign.pth does not say which data", "--data")
    fails("ptq --data none -o a", "needs images", "--data")
    fails(["qat", "--data", "none", "-o", "a"], "needs images", "--data")
    fails("train resnet8 --data none -o t.pth", "--data")
    fails("analyze model.pth --data digitz -o a", "'digitz'", "did you mean digits")
    fails("analyze model.pth --data flowers.zip -o a", "flowers.zip does not exist")
    fails("analyze model.pth --data-root gone -o a --data cifar10", "gone")


FIVE = """from torch import nn

def net(classes):
    return nn.Sequential(nn.Conv2d(5, 8, 3), nn.Flatten(), nn.Linear(8 * 36, classes))

net.input_size = (5, 8, 8)
"""


def test_data_of_other_channels_than_the_network_takes(here, fails):
    name = f"five_{os.getpid()}"
    Path(f"{name}.py").write_text(FIVE)
    state = {"0.weight": (8, 5, 3, 3), "0.bias": (8,), "2.weight": (10, 288), "2.bias": (10,)}
    torch.save({key: torch.zeros(shape) for key, shape in state.items()}, "g.pth")
    argv = ["analyze", "g.pth", "--model", f"{name}:net", "--normalize", "none", "--data"]
    try:
        fails([*argv, "digits"], "images of digits have 1 channels, but the network takes 5")
        assert main([*argv, "none", "-o", "five"]) == 0
    finally:
        sys.modules.pop(name, None)


def test_a_normalization_that_cannot_be_proposed(here, fails):
    torch.save(torch.load("model.pth")["state"], "foreign.pth")
    argv = "analyze foreign.pth --data digits --input-size 16 -o a"
    fails(argv, "--normalize must be given", "better than guessing")


# -- training --------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite(here, capsys):
    before = listing(here)
    argv = ["qat", "--set", "lr=1e30", "--set", "clip_norm=0", "--set", "warmup_epochs=0", *FAST]
    assert main([*argv, "-o", "runs/nan"]) == 2
    err = capsys.readouterr().err
    assert "error: the loss became non-finite in epoch 0, step" in err
    assert "Try a lower lr (now 1e+30)" in err
    new = listing(here).keys() - before.keys()
    assert "runs/nan/qat.pth" not in new
    assert not [name for name in new if "tmp" in name]
    assert {k: v for k, v in listing(here).items() if k in before and k != "runs/.newest"} == {
        k: v for k, v in before.items() if k != "runs/.newest"
    }


def test_nothing_to_resume(here, fails):
    shutil.copy("runs/model/ptq.pth", "runs/model/qat.pth")
    fails("qat --resume", "runs/model/checkpoint.pth", "is finished", "with --force")
    fails("train resnet8 --data digits --resume", "model.train/checkpoint.pth")


def test_a_resume_with_nothing_begun_starts(here, capsys):
    ptq = ["ptq", "--effort", "best", "--iterations", "2", "--num-calib", "8"]
    assert main([*ptq, "-o", "a", "--resume"]) == 0
    assert main([*ptq, "-o", "b"]) == 0
    a, b = (load_safe(Path(run) / "ptq.pth")["state"] for run in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert main(["qat", "--resume", "-o", "c", *FAST]) == 0


def test_recipes(fails):
    fails("qat -o a --recipe qta", "'qta'", "did you mean qat")
    fails("qat -o a --set lrr=1", "lrr is not a known key", "did you mean lr")
    fails("qat -o a --set lr=-1", "lr:", "Got -1")
    fails("qat -o a --set lr", "--set must be KEY=VALUE", "'lr'")
    fails(["qat", "-o", "a", "--set", "lr=[1"], "--set lr must be a plain value", "'[1'")


# -- places ----------------------------------------------------------------------------------------


def test_outputs_that_exist(here, fails):
    fails("analyze model.pth", "runs/model/policy.yaml exists already", "--force", "-o")
    fails("ptq", "runs/model/ptq.pth exists already")
    shutil.copy("runs/model/ptq.pth", "runs/model/qat.pth")
    fails("qat", "runs/model/qat.pth exists already")
    fails("train resnet8 --data digits", "model.pth exists already")
    fails("ensemble model.pth -o model.pth", "model.pth exists already")


@pytest.mark.parametrize("place", ["model.pth/x", "/proc/x"])
@pytest.mark.parametrize(
    "command",
    [
        "analyze model.pth -o {}",
        "ptq -o {}",
        "qat -o {}",
        "export -o {}",
        "train resnet8 --data digits -o {}/m.pth",
        "ensemble model.pth -o {}/e.pth",
    ],
)
def test_places_that_cannot_be_written(fails, command, place):
    fails(command.format(place), place, "cannot be written", "-o")


@pytest.mark.parametrize("command", ["analyze model.pth", "ptq", "qat", "export", "bench"])
def test_out_is_a_run_and_not_a_file(fails, command):
    fails(f"{command} -o model.pth", "-o must name a run folder", "model.pth is a file")
    fails(f"{command} -o m.onnx", "-o must name a run folder", "Try -o m.")


@pytest.mark.parametrize(
    "command",
    [
        "analyze model.pth --data none -o a",
        "ptq --effort fast --num-calib 16 -o a",
        "qat --epochs 1 -o a",
        "ensemble model.pth -o e.pth",
        "export --verify 0",
    ],
)
def test_a_full_disk(here, capsys, monkeypatch, command):
    def full(_handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = {k: v for k, v in listing(here).items() if v}
    monkeypatch.setattr(os, "fsync", full)
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ")
    assert "No space left on device" in err
    assert {k: v for k, v in listing(here).items() if v} == before


def test_a_full_disk_behind_stdout():
    with open("/dev/full", "w") as full:
        done = subprocess.run([*MPQ, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: No space left on device\n"


# -- options ---------------------------------------------------------------------------------------


def test_budgets_out_of_reach_are_answered_with_the_range(fails):
    argv = "analyze model.pth --num-calib 16 -o a "
    fails(argv + "--effective-bits 3", "effective_bits must be in 4..8, got 3", "--bits")
    fails(argv + "--max-size-mb 0.01", "max_size_mb must be in 0.04", "got 0.01")
    fails(argv + "--max-bops 0.001", "max_bops must be in", "got 0.001")


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("analyze model.pth --metric fishr", ["--metric", "fisher"]),
        ("analyze model.pth --bits 9", ["--bits", ", ".join(map(str, WIDTHS)), "'9'"]),
        ("analyze model.pth --bits 8,x", ["--bits", "'x'"]),
        ("analyze model.pth --act-bits 9 -o a", ["--act-bits", "'9'"]),
        ("analyze model.pth --bits 8 --act-bits 16 -o a", ["--act-bits"]),
        ("analyze model.pth --effective-bits nan", ["--effective-bits", "above 0"]),
        ("analyze model.pth --effective-bits -1", ["--effective-bits", "above 0", "-1"]),
        ("analyze model.pth --effective-bits many", ["--effective-bits", "many"]),
        ("analyze model.pth --normalize 1,2/3", ["3 means"]),
        ("ptq --calibration entropy", ["--calibration", "percentile"]),
        ("ptq --num-calib 0", ["--num-calib"]),
        ("qat --device tpu", ["--device", "cpu"]),
        ("ptq --epochs 3", ["--epochs"]),
        ("quantize model.pth", ["no command 'quantize'"]),
    ],
)
def test_unknown_option_values(fails, command, told):
    fails(command, *told)


def test_cuda_that_is_not_there(fails):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    fails("qat --device cuda -o a", "--device must be cpu here")
    fails("analyze model.pth --device cuda -o a", "--device must be cpu here")
