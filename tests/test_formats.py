"""Files that hold networks: what of them is taken, what is said of it, and what is refused.

No network is reached. Tests of a library that is not installed are skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from mpq import _torchvision, zoo
from mpq.checkpoint import load_model, weights_hash
from mpq.cli import main
from mpq.data import DataSource, open_data
from mpq.errors import CheckpointError, UsageError
from mpq.pipeline.exporting import float_reference
from mpq.pipeline.quantizing import load_quantized
from mpq.policy import Policy
from mpq.train.ensemble import load_ensemble
from mpq.userimport import trusting, working_directory
from mpq.zoo.parts import states

State = dict[str, Tensor]
RESNET, OTHER = "resnet8", "resnet20"


def state(arch: str = RESNET, plus: float = 0.0) -> State:
    torch.manual_seed(0)
    made = zoo.build(arch, 10).state_dict()
    return {k: v + plus if v.is_floating_point() else v for k, v in made.items()}


def under(prefix: str, tensors: State) -> State:
    return {prefix + name: tensor for name, tensor in tensors.items()}


EMA, RAW = state(), state(plus=1.0)
MEAN = {"n_averaged": torch.tensor(7), **under("module.", EMA)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "m.pth"


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "mpq")
    return caplog


def is_ema(module: nn.Module) -> bool:
    weight = module.state_dict()["conv1.weight"]
    assert torch.equal(weight, EMA["conv1.weight"]) or torch.equal(weight, RAW["conv1.weight"])
    return torch.equal(weight, EMA["conv1.weight"])


# Averaged weights

BOTH = {
    "timm": {"state_dict": RAW, "state_dict_ema": EMA},
    "torch": {"model": RAW, "model_ema": MEAN},
    "params": {"params": RAW, "params_ema": EMA},
    "ema": {"model": RAW, "ema": EMA, "epoch": 3},
    "in one state": {**under("online_model.", RAW), **under("ema_model.", EMA)},
    "lightning": {
        "state_dict": under("model.", EMA),
        "current_model_state": under("model.", RAW),
        "averaging_state": {"n_averaged": torch.tensor(7)},
    },
}


@pytest.mark.parametrize("content", BOTH.values(), ids=BOTH)
def test_averaged_weights_are_taken_unless_the_raw_are_asked_for(content, file, said):
    torch.save(content, file)
    assert is_ema(load_model(file).module)
    assert "taken are the averaged weights" in said.text
    assert "--weights raw takes them" in said.text
    assert is_ema(load_model(file, weights="ema").module)
    assert not is_ema(load_model(file, weights="raw", arch=RESNET).module)


@pytest.mark.parametrize("content", [MEAN, {"state_dict_ema": EMA}], ids=["mean", "ema"])
def test_averaged_weights_alone(content, file, said):
    torch.save(content, file)
    assert is_ema(load_model(file).module)
    assert "taken are the averaged weights" in said.text
    with pytest.raises(CheckpointError, match=r"--weights must be ema, raw, or .* Got 'raw'"):
        load_model(file, weights="raw")


def test_averaged_modules_in_a_trusted_pickle(file):
    torch.manual_seed(0)
    net = zoo.build(RESNET, 10)
    raw = zoo.build(RESNET, 10)
    raw.load_state_dict(RAW)
    torch.save({"model": raw.half(), "ema": AveragedModel(net)}, file)
    assert is_ema(load_model(file, trust_pickle=True).module)
    found = load_model(file, trust_pickle=True, weights="raw").module
    assert found.state_dict()["conv1.weight"].dtype == torch.float32
    assert not torch.equal(found.state_dict()["conv1.weight"], EMA["conv1.weight"])


# More than the network

BESIDE = {
    "criterion": ({"criterion.weight": torch.ones(10)}, "left out are criterion (1)"),
    "metric": ({"val_acc.total": torch.tensor(3)}, "left out are val_acc (1)"),
    "teacher": (under("teacher.", state(OTHER)), "those under state_dict.teacher fit too"),
}


@pytest.mark.parametrize("arch", [None, RESNET])
@pytest.mark.parametrize("kind", BESIDE)
def test_a_lightning_module_is_more_than_its_network(kind, arch, file, said):
    more, words = BESIDE[kind]
    torch.save({"state_dict": {**under("model.", EMA), **more}, "epoch": 3}, file)
    loaded = load_model(file, arch=arch)
    assert loaded.info.arch == RESNET
    assert is_ema(loaded.module)
    assert "taken are the weights under state_dict.model" in said.text
    assert words in said.text or (arch and "left out are teacher" in said.text)


def test_a_teacher_is_taken_by_its_name(file):
    content = {**under("model.", EMA), **under("teacher.", state(OTHER))}
    torch.save({"state_dict": content}, file)
    assert load_model(file, weights="teacher").info.arch == OTHER
    assert load_model(file, weights="state_dict.teacher").info.weights == "state_dict.teacher"
    assert load_model(file, arch=OTHER).info.arch == OTHER
    with pytest.raises(CheckpointError, match=r"Got 'state_dict.teachr'.* did you mean .*teacher"):
        load_model(file, weights="state_dict.teachr")


def test_several_that_fit_are_refused_with_the_choices(file):
    torch.save({"state_dict": {**under("a.", EMA), **under("b.", RAW)}}, file)
    message = r"m.pth: .*several networks fit.*--weights state_dict\.a, --weights state_dict\.b"
    for arch in (None, RESNET):
        with pytest.raises(CheckpointError, match=message):
            load_model(file, arch=arch)
    assert not is_ema(load_model(file, weights="b").module)


@pytest.mark.parametrize(
    "prefix", ["module._orig_mod.", "_orig_mod.module.", "model._orig_mod.", "net.model.module."]
)
def test_prefixes_in_any_nesting(prefix, file):
    torch.save({"state_dict": {**under(prefix, EMA), "loss.weight": torch.ones(1)}}, file)
    assert is_ema(load_model(file).module)


def test_parts_that_were_wrapped_alone(file):
    names = {name: name.replace("layer1.0.", "layer1.0._orig_mod.") for name in EMA}
    names = {k: v.replace("conv1.", "_fsdp_wrapped_module.conv1.") for k, v in names.items()}
    torch.save({names[name]: tensor for name, tensor in EMA.items()}, file)
    assert load_model(file).info.sha256 == weights_hash(EMA)


def test_halves_become_floats_with_a_word(file, said):
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in EMA.items()}, file)
    assert load_model(file).module.conv1.weight.dtype == torch.float32
    assert "what is torch.float16 becomes float32" in said.text


def test_states_of_an_optimizer_are_no_network():
    moments = {0: {"exp_avg": torch.ones(3)}}
    found = states({"model": EMA, "optimizer": {"state": moments}, "lr_scheduler": {"a": RAW}})
    assert [part.name for part in found] == ["model"]


# Safetensors


def test_safetensors(tmp_path, said):
    path = tmp_path / "m.safetensors"
    save_file(under("model.", EMA), path)
    assert is_ema(load_model(path).module)
    save_file(state(OTHER), path)
    with pytest.raises(CheckpointError, match=r"must be those of resnet8, but differ: .*not expec"):
        load_model(path, arch=RESNET)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"a safetensors file, but damaged or truncated"):
        load_model(path)


def test_torchscript_gives_its_weights_at_most(file):
    torch.manual_seed(0)
    torch.jit.save(torch.jit.trace(zoo.build(RESNET, 10), torch.zeros(1, 3, 16, 16)), file)
    with pytest.raises(CheckpointError, match=r"a TorchScript archive.*torch.export.save \(.pt2\)"):
        load_model(file)
    assert is_ema(load_model(file, trust_pickle=True).module)


# Programs and factories with weights of their own

MINE = """
import torch
from torch import nn

def net(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))

def other(classes=10):
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 6 * 6, classes))

def grey(classes=10):
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(8, classes))

class Fixed(nn.Sequential):
    def forward(self, x):
        return self[1](self[0](x).reshape(x.shape[0], -1))

def fixed():
    return Fixed(nn.Conv2d(3, 8, 3), nn.Linear(288, 10))

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.stem, self.head = nn.Embedding(5, 8), nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, image, words):
        return self.head(self.stem(image).mean((2, 3)) + self.table(words).mean(1))

class Boxes(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem, self.cls = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)
        self.box = nn.Linear(4, 4 * classes)

    def forward(self, x):
        x = self.stem(x).mean((2, 3))
        return self.cls(x), self.box(x)

net.input_size = (3, 8, 8)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)  # of tests/faults; put back afterwards
    yield importlib.import_module("mine")
    sys.modules.pop("mine", None)


def fast(*argv: str) -> int:
    return main([*argv, "--num-calib", "16", "--effort", "fast"])


def quantized(argv: str, capsys: pytest.CaptureFixture[str], *more: str) -> Policy:
    """Analyzed, quantized, and read back as `export` does; the policy."""
    analyze = ["analyze", *argv.split(), "--num-calib", "16", "-o", "r"]
    assert main(analyze) == 0, capsys.readouterr().err
    assert fast("ptq", "--policy", "r", *more) == 0, capsys.readouterr().err
    path, source, trust = Path("r/ptq.pth"), DataSource(), "--trust-pickle" in more
    with trusting("mine:net"):
        found = load_quantized(path, source, trust_pickle=trust)
        reference = float_reference(found, path, source, trust_pickle=trust)
    assert reference is not None
    assert found.graph.module(torch.zeros(1, *reference.info.input)).shape == (1, 10)
    return Policy.load("r/policy.yaml")


def exported(*more: str) -> int:
    """The exit code of an export that verifies its file."""
    return main(["export", "r", "--num-test", "8", *more])


DATA = "--data digits --normalize none"


def test_a_program_goes_all_the_way(mine, capsys):
    batch = {0: torch.export.Dim.AUTO}
    program = torch.export.export(
        mine.net().eval(), (torch.zeros(2, 3, 8, 8),), dynamic_shapes=(batch,)
    )
    torch.export.save(program, "net.pt2")
    with pytest.raises(UsageError, match=r"net.pt2 says what it is: pt2:net. Give it without --mo"):
        load_model("net.pt2", arch="resnet8")
    with pytest.raises(UsageError, match=r"--weights chooses among the parts of a checkpoint"):
        load_model("net.pt2", weights="ema")
    argv = ["ensemble", "net.pt2", *DATA.split(), "-o", "ens.pth"]
    assert main(argv) == 0, capsys.readouterr().err
    with trusting("mine:net"):
        teachers = [load_ensemble(Path(p), normalize="none") for p in ("ens.pth", "mine:net")]
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(teachers[0].answer(0, x), load_model("net.pt2").module(x))
    assert [t.names for t in teachers] == [["net"], ["mine:net"]]
    policy = quantized(f"net.pt2 {DATA}", capsys)
    assert policy.model is not None
    assert (policy.model.arch, policy.model.classes, policy.model.input) == (
        "pt2:net",
        10,
        (3, 8, 8),
    )
    Path("net.pt2").unlink()
    assert exported() == 2
    assert "pt2:net can be built from its own file only" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"ens.pth: member 0 cannot be rebuilt: .*net.pt2"):
        load_ensemble(Path("ens.pth"))


def test_a_program_of_one_batch_size_is_refused(mine, capsys):
    program = torch.export.export(mine.fixed().eval(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, "net.pt2")
    assert main(["analyze", "net.pt2", "--data", "none"]) == 2
    assert "must be exported with a dynamic batch" in capsys.readouterr().err


def test_a_program_of_two_inputs_is_analyzed_without_data(mine, capsys):
    call = (torch.rand(2, 3, 8, 8), torch.zeros(2, 4, dtype=torch.int64))
    batch = ({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO})
    program = torch.export.export(mine.Pair().eval(), call, dynamic_shapes=batch)
    torch.export.save(program, "pair.pt2")
    assert main(["analyze", "pair.pt2", "--data", "none"]) == 0, capsys.readouterr().err
    assert main(["analyze", "pair.pt2", *DATA.split(), "-o", "d"]) == 2
    assert "must take one batch of images to be given digits. It takes" in capsys.readouterr().err


def test_a_factory_may_bring_its_weights(mine, capsys):
    policy = quantized(f"mine:net {DATA}", capsys)
    assert policy.model is not None
    assert (policy.model.arch, policy.model.checkpoint) == ("mine:net", "")
    assert policy.model.sha256 == weights_hash(mine.net().state_dict())
    with pytest.raises(
        UsageError, match="is an architecture, and its weights must come from a fil"
    ):
        load_model("timm:resnet18")


def test_a_pickled_network_goes_all_the_way(mine, capsys):
    torch.save(mine.net(), "whole.pth")
    policy = quantized(f"whole.pth {DATA} --trust-pickle", capsys, "--trust-pickle")
    assert policy.model is not None
    assert policy.model.arch == "torch.nn.modules.container:Sequential"
    assert exported("--trust-pickle") == 0, capsys.readouterr().err
    assert Path("r/float.onnx").is_file()
    assert main(["verify", "r", "--num-test", "8", "--trust-pickle"]) == 0, capsys.readouterr().err


def test_raw_weights_stay_raw_in_later_commands(mine, capsys):
    trained, averaged = mine.net().state_dict(), mine.net().state_dict()
    averaged["0.weight"] = averaged["0.weight"] + 1
    torch.save({"state_dict": trained, "state_dict_ema": averaged}, "m.pth")
    policy = quantized(f"m.pth --model mine:net --weights raw {DATA}", capsys)
    assert policy.model is not None
    assert (policy.model.weights, policy.model.sha256) == ("raw", weights_hash(trained))


def test_the_classes_of_a_factory_are_solved_for(mine, file):
    with pytest.raises(AssertionError):  # the last weight says another number
        assert list(mine.Boxes(7).state_dict().values())[-2].shape[0] == 7
    torch.save(mine.Boxes(7).state_dict(), file)
    loaded = load_model(file, arch="mine:Boxes")
    assert (loaded.info.classes, loaded.module.cls.out_features) == (7, 7)


def test_the_input_shape_is_as_said(mine, capsys):
    torch.save(mine.grey().state_dict(), "grey.pth")
    argv = ["analyze", "grey.pth", "--model", "mine:grey", "--input-shape", "1,12,10", "-o", "g"]
    assert main([*argv, "--data", "none"]) == 0
    model = Policy.load("g/policy.yaml").model
    assert model is not None
    assert model.input == (1, 12, 10)
    assert main([*argv, "--data", "digits", "--normalize", "imagenet", "--force"]) == 2
    assert "imagenet is for images of 3 channels, but these have 1" in capsys.readouterr().err
    assert main([*argv, "--data", "digits", "--normalize", "none", "--force"]) == 0
    assert main([*argv[:-3], "1,0", "--data", "none"]) == 2
    assert "must be C,H,W or H,W or one side" in capsys.readouterr().err


def test_teachers_of_ones_own_kind(mine, capsys):
    torch.save(mine.net().state_dict(), "t.pth")
    ensemble = ["ensemble", "t.pth", "--data", "digits", "--normalize", "none", "-o", "ens.pth"]
    assert main(ensemble) == 2
    assert "--model" in capsys.readouterr().err
    assert main([*ensemble, "--model", "mine:net"]) == 0
    argv = [
        "analyze",
        "t.pth",
        "--model",
        "mine:net",
        *DATA.split(),
        "--num-calib",
        "16",
        "-o",
        "r",
    ]
    assert main(argv) == 0
    qat = ["qat", "--policy", "r", "--epochs", "1", "--teacher", "t.pth"]
    assert main([*qat, "--teacher-normalize", "none"]) == 2
    assert "--teacher-model" in capsys.readouterr().err
    assert main([*qat, "--teacher-normalize", "none", "--teacher-model", "mine:net"]) == 0


# Code that imports torchvision


ASKING = """
import importlib.util
import sys
import numpy as np
from torch import nn

sys.modules.pop("torchvision", None)  # so that it is looked for
assert importlib.util.find_spec("torchvision")

class Net(nn.Linear):
    pass

def net(classes=2): return Net(3, classes)
def images(): return np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 2
"""


@pytest.mark.parametrize("way", ["factory", "pickle", "data"])
def test_torchvision_is_repaired_before_code_of_users_looks_for_it(way, tmp_path, monkeypatch):
    name, repaired = f"asking_as_{way}", []
    (tmp_path / f"{name}.py").write_text(ASKING)
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        monkeypatch.setitem(sys.modules, module, sys.modules[module])  # put back afterwards
    monkeypatch.chdir(tmp_path)
    if way == "pickle":
        with working_directory():
            torch.save(importlib.import_module(name).Net(3, 2), "whole.pth")
        del sys.modules[name]
    monkeypatch.setattr(_torchvision, "declare_missing", lambda: repaired.append(way))
    try:
        if way == "factory":
            torch.save({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, "state.pth")
            load_model("state.pth", arch=f"{name}:net")
        elif way == "pickle":
            load_model("whole.pth", trust_pickle=True)
        else:
            with trusting(f"{name}:images"):
                open_data(f"{name}:images")
    finally:
        sys.modules.pop(name, None)
    assert repaired == [way]


def test_code_of_users_may_import_torchvision(tmp_path):
    (tmp_path / "tv.py").write_text(
        "import numpy as np\nimport torchvision\n"
        "def images(): return np.zeros((40, 8, 8, 3), np.uint8), np.arange(40) % 2\n"
    )
    ask = "from mpq import trusting\nfrom mpq.data import open_data\n"
    run(f"{ask}with trusting('tv:images'): open_data('tv:images')", tmp_path)


def test_any_network_of_torchvision(file):
    net = zoo.build("torchvision:lraspp_mobilenet_v3_large", 5)
    torch.save(net.state_dict(), file)
    info = load_model(file, arch="torchvision:lraspp_mobilenet_v3_large").info
    assert (info.classes, info.input[0]) == (5, 3)
    with pytest.raises(UsageError, match=r"torchvision has no network of the name 'resnet1'.*mean"):
        load_model(file, arch="torchvision:resnet1")


# Other libraries


def needs(library: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(library) is None
    return pytest.mark.skipif(missing, reason=f"{library} is not installed")


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_a_library_that_is_missing_is_named(file):
    torch.save(EMA, file)
    with pytest.raises(UsageError, match=r"timm:resnet18 needs timm, .*pip install timm"):
        load_model(file, arch="timm:resnet18")


@needs("timm")
def test_timm(file, capsys, monkeypatch):
    monkeypatch.chdir(file.parent)
    net = zoo.build("timm:test_efficientnet", 10)
    torch.save({"state_dict": RAW, "state_dict_ema": net.state_dict()}, file)
    info = load_model(file, arch="timm:test_efficientnet").info
    assert (info.classes, info.input) == (10, (3, 160, 160))
    policy = quantized(f"m.pth --model timm:test_efficientnet --input-shape 32 {DATA}", capsys)
    assert policy.model is not None
    assert policy.model.input == (3, 32, 32)
    with pytest.raises(UsageError, match=r"timm has no network of the name 'resnet1x'"):
        load_model(file, arch="timm:resnet1x")
    with pytest.raises(UsageError, match=r"timm has no network of the name 'hf-hub:a/b'"):
        load_model(file, arch="timm:hf-hub:a/b")


def write(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


@needs("timm")
def test_a_folder_of_timm(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    net, folder = zoo.build("timm:test_efficientnet", 10), Path("hub")
    config = {"input_size": [3, 32, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    write(
        folder, {"architecture": "test_efficientnet", "num_classes": 10, "pretrained_cfg": config}
    )
    save_file(net.state_dict(), folder / "model.safetensors")
    info = load_model(folder).info
    assert (info.arch, info.normalize) == ("timm:test_efficientnet", "0.5,0.5,0.5/0.5,0.5,0.5")
    assert info.sha256 == weights_hash(net.state_dict())
    policy = quantized("hub --data digits", capsys)
    assert policy.model is not None
    assert (policy.model.checkpoint, policy.model.input) == ("hub", (3, 32, 32))
    save_file(EMA, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"hub: the weights must be those of test_eff.* missing"
    ):
        load_model(folder)


@needs("transformers")
@pytest.mark.parametrize("shard", ["1GB", "2KB"])
def test_a_folder_of_transformers(shard, tmp_path, monkeypatch, capsys):
    _torchvision.declare_missing()
    from transformers import ResNetConfig, ResNetForImageClassification

    monkeypatch.chdir(tmp_path)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1],
                          layer_type="basic", num_labels=10)  # fmt: skip
    torch.manual_seed(0)
    net = ResNetForImageClassification(config).eval()
    net.half().save_pretrained("hub", max_shard_size=shard)
    sharded = Path("hub/model.safetensors.index.json").is_file()
    assert sharded == (shard == "2KB")
    shown = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}}
    Path("hub/preprocessor_config.json").write_text(json.dumps(shown))
    loaded, images = load_model("hub"), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.module(images), net.float()(images).logits)
    assert loaded.info.arch == "transformers:ResNetForImageClassification"
    assert (loaded.info.input, loaded.info.classes) == ((3, 32, 32), 10)
    if not sharded:
        quantized("hub --data digits", capsys)


@needs("transformers")
def test_a_folder_with_code_or_foreign_weights(tmp_path):
    _torchvision.declare_missing()
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    save_file(EMA, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"must be those of ResNetFor.* missing \("):
        load_model(tmp_path)
    write(tmp_path, {**text, "architectures": ["Evil"], "auto_map": {"AutoModel": "evil.Evil"}})
    with pytest.raises(CheckpointError, match=r"Got 'Evil'. Code that comes with a folder is not"):
        load_model(tmp_path)


FOLDERS = {
    "no config": (None, True, "must hold config.json and model.safetensors"),
    "no weights": ({"architecture": "resnet18"}, False, "Other files are pickles"),
    "no network": ({"a": 1}, True, r"must name a network: .* Got the keys a\."),
    "text": ("x", True, "config.json must hold a JSON object"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_that_hold_no_network(kind, tmp_path):
    config, weights, message = FOLDERS[kind]
    if config is not None:
        write(tmp_path, config)
    if weights:
        save_file(EMA, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path)


def run(code: str, folder: Path) -> str:
    """What a script prints; libraries that change the process have one of their own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


YOLO = """
import os
os.environ |= {"YOLO_CONFIG_DIR": os.getcwd(), "YOLO_AUTOINSTALL": "false"}
import torch
from mpq import _torchvision
from mpq.checkpoint import load_model
_torchvision.declare_missing()
from ultralytics.nn.tasks import DetectionModel
net = DetectionModel("yolov8n.yaml", nc=4, verbose=False).half()
torch.save({"model": net, "ema": None, "date": "today", "version": "8"}, "y.pt")
loaded = load_model("y.pt", trust_pickle=True, input=(64, 64))
assert next(loaded.module.parameters()).dtype == torch.float32
print(loaded.info.arch, loaded.info.input)
from mpq.cli import main
shape = ["--input-shape", "64", "--trust-pickle"]
assert main(["analyze", "y.pt", *shape, "--data", "none", "-o", "r"]) == 0
"""


@needs("ultralytics")
@needs("cv2")
def test_ultralytics(tmp_path):
    assert "ultralytics.nn.tasks:DetectionModel (3, 64, 64)\n" in run(YOLO, tmp_path)
    with pytest.raises(CheckpointError, match=r"ultralytics.nn.tasks.DetectionModel.*--trust-pic"):
        load_model(tmp_path / "y.pt")


LIGHTNING = """
from pathlib import Path
import torch
from torch import nn
from mpq import _torchvision
_torchvision.declare_missing()
from lightning.pytorch import LightningModule, Trainer
from mpq import zoo

class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.save_hyperparameters({"lr": 0.1, "where": Path("x")})
        self.net, self.criterion = zoo.build("resnet8", 10), nn.CrossEntropyLoss(torch.ones(10))

    def training_step(self, batch, index):
        return self.net(batch[0]).sum() * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

trainer = Trainer(max_steps=1, logger=False, enable_progress_bar=False, accelerator="cpu",
                  enable_checkpointing=False, enable_model_summary=False)
data = torch.utils.data.TensorDataset(torch.zeros(2, 3, 8, 8))
trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=2))
trainer.save_checkpoint("l.ckpt")
"""


@needs("lightning")
def test_a_checkpoint_that_lightning_wrote(tmp_path, said):
    run(LIGHTNING, tmp_path)
    assert load_model(tmp_path / "l.ckpt").info.arch == RESNET
    assert "taken are the weights under state_dict.net; left out are criterion (1)" in said.text
