from __future__ import annotations

import argparse
import importlib
import os
import pickle
import resource
import signal
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mpq import checkpoint, zoo
from mpq.checkpoint import (
    load_model,
    load_safe,
    save_atomic,
    save_model,
    weights_hash,
)
from mpq.errors import CheckpointError, UsageError
from mpq.pipeline.subject import DataSource, open_checkpoint
from mpq.policy import ModelInfo
from mpq.userimport import trusting
from mpq.zoo import fitting, parts, spelling

ROOT = Path(__file__).parent.parent
INFO = ModelInfo(arch="resnet20", classes=10, input=(3, 16, 16), normalize="cifar10")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return zoo.build("resnet20", 10)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.pth"


def _logits(module: nn.Module) -> torch.Tensor:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return module(images)


class Evil:
    """Pickles to a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


# Files of ours


def test_save_and_load_are_inverses(network, file):
    save_model(file, network, info=INFO, data="digits", metrics={"top1": 91.5})
    loaded = load_model(file)
    assert torch.equal(_logits(loaded.module), _logits(network))
    assert not loaded.module.training
    expected = {"checkpoint": str(file), "sha256": weights_hash(network.state_dict())}
    assert loaded.info == INFO.replace(**expected)
    assert (loaded.data, loaded.metrics) == ("digits", {"top1": 91.5})
    assert os.listdir(file.parent) == ["model.pth"]


def test_save_leaves_data_parallel_names_out(network, file):
    save_model(file, nn.DataParallel(network), info=INFO)
    assert set(load_safe(file)["state"]) == set(network.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "mpq/quantized"}, r"must have the format mpq/model, version 1. Got mpq/quant"),
        ({"version": 2}, "Got mpq/model, version 2"),
        ({"info": {"arch": "resnet20"}}, "header of the checkpoint .* is damaged"),
    ],
)
def test_other_files_of_ours(network, file, change, message):
    save_model(file, network, info=INFO)
    save_atomic({**load_safe(file), **change}, file)
    with pytest.raises(CheckpointError, match=message):
        load_model(file)


# Foreign files


@pytest.mark.parametrize("nest", ["", "state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_foreign_state(network, file, nest, prefix):
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    torch.save({nest: state, "epoch": 3, "acc": np.float64(91.0)} if nest else state, file)
    loaded = load_model(file)
    assert torch.equal(_logits(loaded.module), _logits(network))
    assert (loaded.info.arch, loaded.info.classes) == ("resnet20", 10)
    assert (loaded.info.input, loaded.info.normalize) == ((3, 32, 32), "")
    assert loaded.info.sha256 == weights_hash(network.state_dict()) == weights_hash(state)
    assert loaded.data is None
    assert loaded.metrics == {}


def test_training_options_beside_the_weights(network, file):
    torch.save({"args": argparse.Namespace(lr=0.1), "net": network.state_dict()}, file)
    assert load_model(file).info.arch == "resnet20"


def test_legacy_format(network, file):
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=False)
    assert load_model(file).info.arch == "resnet20"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(network, file, dtype):
    state = {
        k: v.to(dtype) if v.is_floating_point() else v for k, v in network.state_dict().items()
    }
    torch.save(state, file)
    module = load_model(file).module
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    expected = network.state_dict()["conv1.weight"].to(dtype).float()
    assert torch.equal(module.state_dict()["conv1.weight"], expected)


def test_given_architecture(network, file):
    torch.save(network.state_dict(), file)
    assert load_model(file, arch="resnet20", classes=10).info.arch == "resnet20"
    message = "must be those of resnet32, but differ: .* missing .*layer1.3.conv1.weight"
    with pytest.raises(CheckpointError, match=message):
        load_model(file, arch="resnet32")
    with pytest.raises(UsageError, match="Got 'resnet2O'"):
        load_model(file, arch="resnet2O")


@pytest.mark.parametrize("arch", [None, "resnet20"])
def test_other_number_of_classes(network, file, arch):
    torch.save(network.state_dict(), file)
    with pytest.raises(CheckpointError, match=r"must have 100 classes. Its last layer has 10"):
        load_model(file, arch=arch, classes=100)


def test_nothing_fits_names_the_file(file):
    torch.save({"conv.weight": torch.zeros(3, 3, 1, 1)}, file)
    with pytest.raises(CheckpointError, match=r"model.pth: .* fit none. Nearest: .*--model"):
        load_model(file)


def test_a_factory_of_other_classes(file, tmp_path, monkeypatch):
    (tmp_path / "tens.py").write_text("from torch import nn\ndef net(): return nn.Linear(8, 10)\n")
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Linear(8, 5).state_dict(), file)
    message = r"differ: 2 .*Give tens:net a parameter num_classes, .* build a network of 5 classes"
    with pytest.raises(CheckpointError, match=message):
        load_model(file, arch="tens:net")
    torch.save(nn.Linear(4, 10).state_dict(), file)
    with pytest.raises(CheckpointError, match="or give the function that builds it"):
        load_model(file, arch="tens:net")


def test_factory(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    arch = "benchmarks.foreign_models:mlperf_tiny_resnet8"
    with trusting(arch):
        network = zoo.build(arch, 5)
        torch.save(network.state_dict(), file)
        loaded = load_model(file, arch=arch)
        assert (loaded.info.arch, loaded.info.classes) == (arch, 5)
        with pytest.raises(CheckpointError, match=r"must have 10 classes. Its last layer has 5"):
            load_model(file, arch=arch, classes=10)
        save_model(file, loaded.module, info=loaded.info, data="digits")
        images = torch.zeros(1, 3, 32, 32)
        assert torch.equal(load_model(file).module(images), network(images))
    with pytest.raises(UsageError, match=f"not run. .* add --trust-code {arch}"):
        load_model(file)


def test_weights_are_hashed_and_stripped_of_prefixes_once(network, file, monkeypatch):
    """Names of the file, of the network and of the hash; none for the candidates of detection."""
    calls = Counter()

    def counted(function):
        def call(*args):
            calls[function.__name__] += 1
            return function(*args)

        return call

    short_names = counted(spelling.short_names)
    for module in (spelling, parts, fitting):
        monkeypatch.setattr(module, "short_names", short_names)
    monkeypatch.setattr(checkpoint, "weights_hash", counted(checkpoint.weights_hash))
    torch.save({"state_dict": network.state_dict()}, file)
    subject = open_checkpoint(file, DataSource("none"))
    assert calls == {"short_names": 3, "weights_hash": 1}
    assert subject.info.sha256 == weights_hash(network.state_dict())


# Bad files


def test_missing(tmp_path, network):
    save_atomic(network.state_dict(), tmp_path / "resnet20.pth")
    with pytest.raises(CheckpointError, match=r"does not exist; did you mean resnet20.pth\?"):
        load_model(tmp_path / "resnet2O.pth")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "none" / "x.pth")
    with pytest.raises(CheckpointError, match=r"must hold config.json and model.safetensors"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"epoch,loss\n1,0.5\n", "a text file"),
        ("größe é".encode() * 800, "a text file"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b'{"layers": []}', "a JSON file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file"),
        (b"\x93NUMPY\x01\x00", "a NumPy array"),
        (b"\x1f\x8b\x08" + bytes(20), "a gzip archive"),
        (b"\x08\x0a\x12\x07pytorch" + bytes(range(128, 200)), "an ONNX file"),
    ],
)
def test_other_kinds_of_file(file, content, what):
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.pth must be a file that torch.* is {what}"):
        load_safe(file)


def test_real_onnx_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    path = tmp_path / "model.pth"
    onnx.save(onnx.helper.make_model(graph, producer_name="test"), str(path))
    with pytest.raises(CheckpointError, match="is an ONNX file: mpq starts from the PyTorch"):
        load_model(path)


def test_zip_that_is_not_torch(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.txt", "hello")
    with pytest.raises(CheckpointError, match=r"a zip archive, but not one that torch.save wrote"):
        load_safe(file)


def test_torchscript(file):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file)
    with pytest.raises(CheckpointError, match=r"a TorchScript archive, whose .* torch.export.save"):
        load_safe(file)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_truncated(network, file, new, kept):
    torch.save(network.state_dict(), file, _use_new_zipfile_serialization=new)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(CheckpointError, match=r"model\.pth .*truncated"):
        load_safe(file)


def test_flipped_bytes_are_found_or_harmless(network, file):
    torch.save(network.state_dict(), file)
    content = bytearray(file.read_bytes())
    content[60:400] = bytes(340)  # inside data.pkl
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged, truncated or not a file"):
        load_safe(file)


def test_plain_pickle(file):
    file.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"not a file that torch.save wrote"):
        load_safe(file)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ([1, 2], "an object of type list"),
        (torch.zeros(2), "an object of type Tensor"),
        ({"epoch": 3, "lr": 0.1}, r"the keys \['epoch', 'lr'\]"),
        ({"state_dict": {}}, r"the keys \[\]"),
    ],
)
def test_no_state_dict_inside(file, content, got):
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=f"must hold a state dict.* Got {got} instead"):
        load_model(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(network, file, value):
    state = {k: v.clone() for k, v in network.state_dict().items()}
    state["layer2.0.conv1.weight"][0, 0, 0, :2] = value
    torch.save(state, file)
    message = r"layer2\.0\.conv1\.weight of .* must be finite, but 2 of its 4608 values are NaN"
    with pytest.raises(CheckpointError, match=message):
        load_model(file)


def test_quantized_tensors(file):
    weight = torch.quantize_per_tensor(torch.ones(2, 2), 0.1, 0, torch.qint8)
    torch.save({"fc.weight": weight}, file)
    with pytest.raises(CheckpointError, match=r"fc\.weight of .* must be a float tensor.*qint8"):
        load_model(file)


# Pickled code


@pytest.mark.parametrize("new", [True, False])
def test_code_is_not_run(file, tmp_path, new):
    torch.save({"x": Evil(tmp_path / "ran")}, file, _use_new_zipfile_serialization=new)
    with pytest.raises(
        CheckpointError, match=r"can run any code, so it is refused.*--trust-pickle"
    ):
        load_safe(file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: {"net": nn.DataParallel(m)}])
def test_pickled_module(network, file, wrap):
    torch.save(wrap(network), file)
    with pytest.raises(CheckpointError, match=r"\(mpq.zoo.resnet.ResNet\).*--trust-pickle|refused"):
        load_model(file)
    loaded = load_model(file, trust_pickle=True)
    assert torch.equal(_logits(loaded.module), _logits(network))
    assert (loaded.info.arch, loaded.info.classes) == ("resnet20", 10)
    assert loaded.info.sha256 == weights_hash(network.state_dict())
    with pytest.raises(CheckpointError, match="must have 7 classes"):
        load_model(file, trust_pickle=True, classes=7)


def test_pickled_module_of_an_unknown_class(file):
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), file)
    info = load_model(file, trust_pickle=True).info
    assert (info.arch, info.classes) == ("torch.nn.modules.container:Sequential", 4)


def test_pickled_module_whose_code_is_gone(file, tmp_path, monkeypatch):
    code = tmp_path / "code_of_a_user.py"
    code.write_text("from torch import nn\nclass Net(nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(importlib.import_module("code_of_a_user").Net(2, 2), file)
    monkeypatch.undo()
    del sys.modules["code_of_a_user"]
    with pytest.raises(CheckpointError, match=r"needs code that cannot be imported here.*--model"):
        load_model(file, trust_pickle=True)
    monkeypatch.chdir(tmp_path)  # the working directory is looked into
    info = load_model(file, trust_pickle=True).info
    assert info.arch == "code_of_a_user:Net"
    del sys.modules["code_of_a_user"]


# Saving


def test_folder_that_does_not_exist(network, tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be written: .*Its folder must exist"):
        save_model(tmp_path / "none" / "model.pth", network, info=INFO)


def test_a_folder_in_place_of_the_file(network, file):
    file.mkdir()
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_model(file, network, info=INFO)
    assert os.listdir(file.parent) == ["model.pth"]


def test_full_disk_leaves_the_old_file(network, file):
    save_model(file, network, info=INFO)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"model\.pth cannot be written"):
            save_model(file, zoo.build("resnet20", 10), info=INFO)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == ["model.pth"]


# The hash


def test_hash_sees_names_values_shapes_and_types():
    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(2)}
    variants = [
        state,
        {**state, "b.weight": torch.tensor([1.0, 2.0])},
        {**state, "a.weight": state["a.weight"].reshape(3, 2)},
        {**state, "b.weight": torch.ones(2, dtype=torch.float64)},
        {"a.weight": state["a.weight"], "c.weight": torch.ones(2)},
    ]
    assert len({weights_hash(v) for v in variants}) == len(variants)


def test_hash_ignores_prefixes_counters_order_and_memory_layout():
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"a.weight": weight, "b.weight": torch.ones(())}
    same = {
        "module.b.weight": torch.ones(()),
        "module.a.weight": weight.t().contiguous().t(),
        "module.b.num_batches_tracked": torch.tensor(7),
    }
    assert weights_hash(state) == weights_hash(same)


# Real files


@pytest.mark.parametrize(
    ("name", "arch", "classes"),
    [
        ("resnet20-cifar10", None, 10),
        ("resnet32-cifar10", None, 10),
        ("resnet44-cifar10", None, 10),
        ("resnet56-cifar10", None, 10),
        ("resnet56-conv-shortcut-cifar10", None, 10),
        ("resnet20-stage-relu-cifar100", "resnet_stage_relu_20", 100),
        ("resnet32-stage-relu-cifar100", "resnet_stage_relu_32", 100),
        ("mlperf-tiny-resnet8-cifar10", "mlperf_tiny_resnet8", 10),
    ],
)
def test_public_checkpoints(name, arch, classes, monkeypatch):
    root = os.environ.get("MPQ_DATA")
    path = Path(root or "").resolve() / "checkpoints" / f"{name}.pth"
    if not root or not path.exists():
        pytest.skip("MPQ_DATA does not point to the public checkpoints")
    monkeypatch.chdir(ROOT)
    if arch:
        with pytest.raises(CheckpointError, match=r"fit none. Nearest: "):
            load_model(path)
    factory = f"benchmarks.foreign_models:{arch}" if arch else None
    with trusting(*filter(None, [factory])):
        loaded = load_model(path, arch=factory)
    expected = factory or name.split("-")[0]
    expected += "_conv" if "conv" in name else ""
    assert (loaded.info.arch, loaded.info.classes) == (expected, classes)
    assert loaded.module(torch.zeros(1, 3, 32, 32)).shape == (1, classes)
