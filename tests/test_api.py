"""The verbs in Python: data in every form, and options and results of the commands."""

from __future__ import annotations

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mpq
from mpq import zoo
from mpq.checkpoint import save_model
from mpq.cli import COMMANDS, main
from mpq.errors import DataError, GraphError, PolicyError, UsageError
from mpq.export import runtime
from mpq.keys import schema
from mpq.pipeline.given import Wanted, gather, given
from mpq.policy import ModelInfo

VERBS = ("analyze", "bench", "certify", "diagnose", "export", "ptq", "qat", "report", "verify")
OF_FILES = {
    "as_json", "force", "out", "resume", "trust_pickle", "trust_code", "data_root", "holdout",
    "unlabelled", "rescore", "checkpoint", "policy_path", "quantized", "files", "file", "run",
    "onnx", "named", "origin", "input_shape", "threads", "answers", "compiling",
    "teacher_normalize", "model", "weights", "teacher_model", "batches",
}  # fmt: skip
"""Options of commands about folders, files and processes."""
OF_VALUES = {
    "model", "data", "normalize", "validation", "example", "progress", "policy", "budget", "path",
    "files", "file", "run", "folder", "resume", "hooks", "force", "threads", "quantized", "results",
}  # fmt: skip
"""Arguments that Python has in their place."""
CALLED = {
    "analyze": {"profile_path": "profile"},
    "export": {"kind": "input"},
}
BUDGETS = {"effective_bits", "max_size_mb", "max_bops", "max_activation_mb", "max_latency_ms",
           "max_drop", "drop_type"}  # fmt: skip


class Net(nn.Module):
    """Grey or colour images to four classes, in a forward that says its argument."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(8, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stem(image)
        return self.fc(torch.relu(self.conv(x) + x).mean((2, 3)))


def net(channels: int = 3, seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(channels).eval()


def values(channels: int = 3, count: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, channels, 8, 8, generator=generator), torch.arange(count) % 4


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def form(name: str) -> Any:
    x, y = values()
    dicts = [{"label": b, "pixel_values": a} for a, b in zip(x.split(16), y.split(16), strict=True)]
    return {
        "tensor": x,
        "loader": DataLoader(TensorDataset(x, y), batch_size=16),
        "tensors only": DataLoader(TensorDataset(x), batch_size=16),
        "batches": list(zip(x.split(16), y.split(16), strict=True)),
        "tensors": list(x.split(16)),
        "dicts": dicts,
    }[name]


@pytest.mark.parametrize(
    ("name", "labelled"),
    [("tensor", False), ("loader", True), ("tensors only", False), ("batches", True),
     ("tensors", False), ("dicts", True)],
)  # fmt: skip
def test_data_in_every_form_are_the_same_images(name: str, labelled: bool) -> None:
    images, labels = gather(form(name), 40, 0)
    assert np.array_equal(images, values()[0][:40].permute(0, 2, 3, 1).numpy())
    assert labels.tolist() == (values()[1][:40].tolist() if labelled else [-1] * 40)


def test_items_of_a_dataset_are_drawn_by_the_seed() -> None:
    data = TensorDataset(*values())
    one, two, other = (gather(data, 8, seed)[0] for seed in (0, 0, 1))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    whole = {image.tobytes() for image in gather(data, None, 0)[0]}
    assert {image.tobytes() for image in one} <= whole
    assert len(whole) == 48


def test_what_is_measured_on_is_not_worked_on() -> None:
    subject = given(net(), form("loader"), Wanted(32, 8))
    assert subject.data is not None
    assert (len(subject.data.train), len(subject.data.validation)) == (32, 8)
    assert np.array_equal(
        subject.data.validation.read([0]), values()[0][32:33].permute(0, 2, 3, 1).numpy()
    )
    apart = given(net(), form("loader"), Wanted(48, 8), validation=-values()[0])
    assert apart.data is not None
    assert np.array_equal(apart.data.test.read([7]), -values()[0][7:8].permute(0, 2, 3, 1).numpy())
    assert not apart.data.labelled


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"must give at least one image\. Got none; an iterator can be read only once"),
        (iter(()), "must give at least one image"),
        (torch.zeros(4, 8, 8), r"images \[N, C, H, W\] of floats.*Got torch\.float32 \[4, 8, 8\]"),
        (torch.zeros(4, 3, 8, 8, dtype=torch.uint8), r"Got torch\.uint8 \[4, 3, 8, 8\]"),
        ([{"picture": torch.zeros(4, 3, 8, 8)}], r"Got dict with keys picture"),
        ([["cat", 1]], "Got list"),
        (3, r"a DataLoader, a Dataset, an iterable of batches, a tensor, or a name.*Got int"),
    ],
)
def test_data_that_are_none(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        mpq.analyze(net(), data)


def test_without_data_an_example_is_needed() -> None:
    with pytest.raises(DataError, match="a batch must be given: example="):
        mpq.analyze(net())
    found = mpq.analyze(net(), example=values()[0])
    assert found.sensitivity.metric == "sqnr"


def test_from_a_network_to_a_file_and_back(here: Path) -> None:
    model, loader = net(), form("loader")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = mpq.analyze(model, loader, budget={"effective_bits": 6}, num_calib=16)
    assert found.policy.result is not None
    assert found.policy.result.effective_bits <= 6
    quantized = mpq.ptq(model, loader, found, num_calib=32)
    assert quantized.policy.layers == found.policy.layers
    assert quantized.module(values()[0]).shape == (48, 4)
    result = mpq.export(quantized)
    assert result.path == Path("model.onnx")
    assert result.verification is not None
    assert result.verification.n == 16  # those that were not calibrated on
    assert result.certificate.integer_macs_fraction == 1
    with pytest.raises(UsageError, match=r"model\.onnx exists already"):
        mpq.export(quantized)
    with pytest.raises(UsageError, match=r"must end in \.onnx\. Got small\.pth"):
        mpq.export(quantized, "small.pth")
    data, named = values()[0], Path("named.onnx")
    mpq.export(quantized, named, data=data, num_test=4, output_names=["classes"])
    assert runtime.session(named).get_outputs()[0].name == "classes"
    named.unlink()
    checked = mpq.verify("model.onnx", quantized)
    assert checked == result.verification
    assert mpq.verify("model.onnx", exact=True).exact
    assert mpq.certify("model.onnx") == result.certificate
    row = mpq.bench("model.onnx", loader, runs=1).rows[0]
    assert (row.n, row.bytes) == (48, result.bytes)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert sorted(p.name for p in here.iterdir()) == ["model.onnx"]  # nothing else was written


def test_grey_images_and_a_teacher_of_ones_own() -> None:
    data = TensorDataset(*values(channels=1))
    kept = net(1)
    trained = mpq.qat(kept, data, teacher=net(1, seed=1), epochs=1, settings={"batch": 16})
    assert trained.metrics["teachers"] == ["Net"]
    assert trained.metrics["validation_top1"] is not None
    assert not torch.equal(trained.module(values(1)[0]), mpq.ptq(kept, data).module(values(1)[0]))
    with pytest.raises(UsageError, match="these images are floats"):
        mpq.qat(kept, data, epochs=1, settings={"trivial": True})


def test_results_are_kept_and_shown(here: Path) -> None:
    model, loader = net(), form("loader")
    found = mpq.analyze(model, loader, budget=[6, 5], num_calib=16)
    back = mpq.Analysis.load(found.save("run"))
    assert back.policies == found.policies
    assert mpq.Policy.load(found.policy.save("p.yaml")) == found.policy
    named = Path("run/policy.yaml").read_text().splitlines()[0].rpartition("=")[2]
    assert json.loads((Path("run") / named).read_text()) == schema()
    assert (back.front, str(back)) == (found.front, str(found))
    assert not Path("runs").exists()
    assert "Sensitivity of each layer" in str(found)
    assert "<table>" in found._repr_html_()
    assert max(map(len, str(found).splitlines()[:-4])) <= 80
    assert found.plot().axes
    assert found.plot("sensitivity").axes
    quantized = mpq.ptq(model, loader, found)
    again = mpq.Quantized.load(quantized.save("q.pth"), net(seed=3))
    assert torch.equal(again.module(values()[0]), quantized.module(values()[0]))
    assert "2 layers W" in str(quantized)
    result = mpq.export(quantized)
    certificate = mpq.Certificate.load(result.certificate.save("certificate.json"))
    assert certificate == result.certificate
    report = result.verification
    assert report is not None
    assert type(report).load(report.save("v.json")).layers[0].name == report.layers[0].name
    with pytest.raises(UsageError, match=r"certificate\.json must hold a VerifyReport"):
        type(report).load("certificate.json")
    with pytest.raises(UsageError, match=r"none\.json cannot be read"):
        mpq.Certificate.load("none.json")
    with pytest.raises(UsageError, match=r"sensitivity\.json does not exist"):
        mpq.Analysis.load("none")
    bench = mpq.bench("model.onnx", loader, runs=1)
    assert bench.plot().axes
    assert "Model files side by side" in str(bench)


def test_a_policy_of_other_weights_is_refused() -> None:
    found = mpq.analyze(net(), form("tensor"), num_calib=16)
    with pytest.raises(PolicyError, match=r"made for other weights.*take policy\.replace"):
        mpq.ptq(net(seed=1), form("tensor"), found)
    mpq.ptq(net(seed=1), form("tensor"), found.policy.replace(model=None))


def test_the_command_and_the_function_give_the_same(here: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = zoo.build("resnet8", 10)
    info = ModelInfo(arch="resnet8", classes=10, input=(3, 16, 16), normalize="none")
    save_model(Path("model.pth"), model, info=info, data="digits")
    assert main(["analyze", "model.pth", "--num-calib", "32", "-o", "r"]) == 0
    found = mpq.analyze("model.pth", num_calib=32)
    assert found.policy == mpq.Policy.load("r/policy.yaml")
    assert main(["ptq", "--policy", "r/policy.yaml", "--num-calib", "32"]) == 0
    quantized = mpq.ptq(model, "digits", found, num_calib=32, normalize="none")
    kept = torch.load("r/ptq.pth", weights_only=True)
    state = quantized.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in kept["state"].items())
    told = {"validation_seen"}  # the file says what it was trained on, a module does not
    assert {k: v for k, v in kept["metrics"].items() if k not in told} == {
        k: v for k, v in quantized.metrics.items() if k not in told
    }
    assert main(["export", "--onnx", "r/ptq.pth"]) == 0  # `--onnx` says nothing, and is taken
    mpq.export("r/ptq.pth", "same.onnx")
    assert Path("same.onnx").read_bytes() == Path("r/model.onnx").read_bytes()
    assert mpq.report("r").name == "report.html"


def options(name: str) -> dict[str, Any]:
    """Options of a command that mean the same in Python, with their defaults."""
    module, _, attribute = COMMANDS[name].where.partition(":")
    command: click.Command = getattr(importlib.import_module(module), attribute)
    context, called = click.Context(command), CALLED.get(name, {})
    params = (
        p for p in command.params if p.name and p.expose_value and p.name not in OF_FILES | BUDGETS
    )
    return {called.get(str(p.name), str(p.name)): p.get_default(context) for p in params}


def arguments(name: str) -> dict[str, Any]:
    parameters = inspect.signature(getattr(importlib.import_module("mpq.api"), name)).parameters
    return {name: parameter.default for name, parameter in parameters.items()}


def comparable(defaults: dict[str, Any]) -> dict[str, Any]:
    """What both sides have, with defaults in one form: lists of widths are texts in a command."""
    found = {}
    for name, value in defaults.items():
        if isinstance(value, tuple):
            value = [int(part) for text in value for part in str(text).split(",")] or None
        known = isinstance(value, str | int | float | list)
        found[name] = (value or None) if known else None
    return {name: value for name, value in found.items() if name not in OF_VALUES}


@pytest.mark.parametrize("name", VERBS)
def test_options_have_the_names_and_defaults_of_the_command(name: str) -> None:
    assert comparable(arguments(name)) == comparable(options(name))


def test_public_names_are_shown_and_can_be_called() -> None:
    assert set(VERBS) <= set(dir(mpq))
    for name in VERBS:
        verb = getattr(mpq, name)
        assert callable(verb)
        assert inspect.signature(verb).parameters
        assert inspect.getdoc(getattr(importlib.import_module("mpq.api"), name))
    from mpq.export import to_onnx  # the package is there as before

    assert to_onnx is mpq.export.to_onnx


def test_what_the_first_version_showed_still_works() -> None:
    graph = mpq.to_float(net(), values()[0])
    scores = mpq.score_layers(graph, values()[0])
    with pytest.warns(DeprecationWarning, match=r"use mpq\.Search\(scores\)\.allocate"):
        widths = mpq.allocate(scores, mpq.Constraints(effective_bits=6))
    assert mpq.build_policy(widths, scores).result is not None


def test_limits_are_named() -> None:
    with pytest.raises(UsageError, match="minimize must be one of bits, size"):
        mpq.analyze(net(), form("tensor"), minimize="speed")
    with pytest.raises(PolicyError, match="max_size is not a known key; did you mean max_size_mb"):
        mpq.analyze(net(), form("tensor"), budget={"max_size": 1})


@pytest.mark.parametrize(("bits", "budget"), [((8,), 8.0), ((16, 8), 9.6), ((8, 4), 4.8)])
def test_without_a_budget_the_widths_have_one(bits: tuple[int, ...], budget: float) -> None:
    """`--bits 8` asks for 8 bits and no more; 4.8 of them was no answer."""
    found = mpq.analyze(net(), form("tensor"), bits=bits, metric="sqnr").policy
    assert found.constraints.effective_bits == budget
    assert min(bits) <= found.result.effective_bits <= budget


def _no_network(kind: str) -> Any:
    """What comes as a network and cannot be worked on."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval()
    if kind == "half":
        return net.half()
    if kind == "nan":
        net[3].weight.data[0, 0] = float("nan")
    made: dict[str, Any] = {
        "scripted": lambda: torch.jit.script(net),
        "traced": lambda: torch.jit.trace(net, torch.rand(1, 3, 8, 8)),
        "inside": lambda: nn.Sequential(torch.jit.script(net), nn.Linear(4, 4)),
        "state": net.state_dict,
        "nan": lambda: net,
    }
    return made[kind]()


@pytest.mark.parametrize("verb", [mpq.analyze, mpq.ptq])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("half", r"must be float32\. Got 0\.weight as float16.*Call \.float\(\)"),
        ("nan", r"must be finite\. 3\.weight holds NaN"),
        ("scripted", "must be a Python module. Got TorchScript"),
        ("traced", "must be a Python module. Got TorchScript"),
        ("inside", "must be a Python module. Got TorchScript as 0"),
        ("state", r"Got OrderedDict\. A state dict needs its network"),
    ],
)
def test_what_is_no_network_of_float32_is_refused_at_once(
    verb: Any, kind: str, message: str
) -> None:
    images = torch.rand(8, 3, 8, 8)
    with pytest.raises((GraphError, UsageError), match=message):
        verb(_no_network(kind), images.half() if kind == "half" else images)
