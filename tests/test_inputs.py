"""Networks that take anything, from `--input-shape` and data of any form to the file that runs."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import mpq
from mpq import Policy
from mpq.cli import main
from mpq.data import open_data
from mpq.data.images import decode
from mpq.errors import DataError, GraphError, UsageError
from mpq.inputs import InputSpec, parse_shape
from mpq.pipeline.anything import called
from mpq.userimport import trusting

LONG = "MPQ_FAULTS" in os.environ
NETWORKS = """
import numpy as np, torch, torch.nn.functional as F
from torch import nn

class Two(nn.Module):
    def __init__(self, classes=5):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.table, self.mix = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.box, self.head = nn.Linear(8, 4), nn.Linear(8, classes)

    def forward(self, image, ids, mask=None, scale=2.0):
        f = F.relu(self.b(F.relu(self.a(image)) * scale)).mean((2, 3))
        t = self.mix(self.table(ids))
        t = t if mask is None else t * mask.unsqueeze(-1)
        f = F.relu(f + t.mean(1))
        return {"boxes": self.box(f), "scores": self.head(f), "top": self.head(f).argmax(1)}

class Signal(nn.Module):
    def __init__(self, dimensions):
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.a, self.b, self.head = conv(2, 8, 3), conv(8, 8, 3, stride=2), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(F.relu(self.b(F.relu(self.a(x)))).flatten(2).mean(2))

def two(classes=5): return Two(classes)
def stated(classes=5): return Two(classes)
stated.input_size = {"image": (3, 8, 12), "ids": "6:int64"}
def one(): return Signal(1)
def three(): return Signal(3)
def images(in_channels=3, classes=5):
    torch.manual_seed(0)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes)]
    return nn.Sequential(nn.Conv2d(in_channels, 8, 3), nn.ReLU(), *head)

def grey(classes=10): return images(1, classes)
grey.input_size = (1, 6, 9)

rng = np.random.default_rng(0)
picture = rng.standard_normal((40, 3, 8, 12)).astype(np.float32)
ids, mask = rng.integers(0, 10, (40, 6)), rng.integers(0, 2, (40, 6)).astype(bool)
def dicts(): return [{"image": picture[i:i+8], "ids": ids[i:i+8]} for i in range(0, 40, 8)]
def tuples(): return [(torch.tensor(picture[i:i+8]), ids[i:i+8]) for i in range(0, 40, 8)]
def pair(): return {"image": picture, "ids": ids}, np.arange(40) % 5
def splits(): return {"train": dicts(), "test": [{"y": ids[:, 0], "image": picture, "ids": ids}]}
def short(): return [{"image": picture[:8], "ids": ids[:7]}]
def few(): return [{"image": picture[:8]}]
def wrong(): return [{"image": picture[:8], "ids": picture[:8, 0, 0, :6]}]
"""
TWO = {"image": InputSpec((3, 8, 12)), "ids": InputSpec((6,), "int64")}


@pytest.fixture
def nets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("some_nets.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "some_nets", raising=False)
    import some_nets

    yield some_nets
    sys.modules.pop("some_nets", None)


def run(capsys, line: str) -> str:
    assert main(shlex.split(line)) == 0, capsys.readouterr().err
    found = capsys.readouterr()
    return found.out + found.err


def refused(capsys, line: str) -> str:
    assert main(shlex.split(line)) == 2
    return capsys.readouterr().err


# --- what is said -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["3,224,224", "1,16000", "77:int64", ":int64", "8,8,3:uint8"])
def test_parse_and_str_are_inverses(text):
    assert str(InputSpec.parse(text)) == text


def test_shapes_are_of_an_image_or_of_inputs_by_name():
    assert parse_shape(()) is None
    assert [parse_shape([t]) for t in ("32", "8,12", "1,8,12")] == [(32, 32), (8, 12), (1, 8, 12)]
    assert parse_shape(["2,8,8,8"]) == {"": InputSpec((2, 8, 8, 8))}
    assert parse_shape(["image=3,8,12", "ids = 6:int64"]) == TWO


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["3,x"], "must be C,H,W or H,W or one side .* Got '3,x'"),
        (["3,0,2"], "sizes of at least 1"),
        (["a=3,8", "a=3,8"], "each name once"),
        (["a=3,8", "4,4"], "each name once"),
        (["a=3:int46"], "one of float32, .* Got 'int46'; did you mean int64"),
        (["a="], "Got ''"),
    ],
)
def test_bad_shapes(texts, message):
    with pytest.raises(UsageError, match=message):
        parse_shape(texts)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int32", "int64", "bool"])
def test_noise_is_of_the_right_kind(dtype):
    noise = InputSpec((50, 40), dtype).noise([0])
    assert (noise.shape, noise.dtype) == ((50, 40), np.dtype(dtype))
    assert float(noise.max()) > {"float32": 2, "uint8": 250}.get(dtype, 0.5)
    assert noise.max() <= {"float32": 9, "uint8": 255}.get(dtype, 1)
    assert np.array_equal(noise, InputSpec((50, 40), dtype).noise([0]))


# --- data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dicts", "tuples", "pair", "splits"])
def test_factories_give_batches_of_several_inputs(nets, form):
    with trusting(f"some_nets:{form}"):
        data = open_data(f"some_nets:{form}", takes=TWO)
    found = data.train.read([0, 1])
    assert {n: (x.shape, str(x.dtype)) for n, x in found.items()} == {
        "image": ((2, 3, 8, 12), "float32"), "ids": ((2, 6), "int64")
    }  # fmt: skip
    assert (data.pixels, data.labelled) == (False, form == "pair")
    if form == "splits":
        assert np.array_equal(data.test.read(range(40))["ids"], nets.ids)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("short", r"of one length n. Got image \[8, 3, 8, 12\], ids \[7, 6\]"),
        ("few", r"must have image and ids. Got the keys image"),
        ("wrong", r"ids of some_nets:wrong must be int64 \[n, 6\].* Got float32 \[8, 6\]"),
    ],
)
def test_batches_that_a_network_does_not_take(nets, form, message):
    with trusting(f"some_nets:{form}"), pytest.raises(DataError, match=message):
        open_data(f"some_nets:{form}", takes=TWO)


def test_files_of_arrays(nets):
    np.savez("two.npz", image=nets.picture.astype(np.float64), ids=nets.ids.astype(np.int32))
    inputs = open_data("two.npz", takes=TWO).train.read([3])
    assert [x.dtype for x in inputs.values()] == [np.float32, np.int64]
    grey, labels = np.arange(40 * 6, dtype=np.uint8).reshape(40, 2, 3), np.arange(40) % 4
    np.savez("grey.npz", pictures=grey, labels=labels)
    data = open_data("grey.npz", size=(1, 2, 3), holdout=0)
    assert (data.pixels, len(data.classes), data.size) == (True, 4, (2, 3))
    assert data.train.read([0]).shape == (1, 2, 3, 1)
    np.save("float.npy", nets.picture)
    with pytest.raises(DataError, match=r"must be float32 \[n, 3, 8, 8\].*Got float32 \[40, 3, 8"):
        open_data("float.npy", size=(3, 8, 8))
    with pytest.raises(DataError, match=r"must have the arrays image, ids, .* Got pictures."):
        open_data("grey.npz", takes=TWO)
    with pytest.raises(DataError, match=r"images of grey.npz must be uint8 \[n, H, W, 5"):
        open_data("grey.npz", size=(5, 2, 3))
    Path("bad.npz").write_text("nothing")
    with pytest.raises(DataError, match=r"bad.npz must be a .npy or .npz file of arrays"):
        open_data("bad.npz")


def png(array: np.ndarray, folder: str, name: str = "0") -> bytes:
    Path(folder).mkdir(exist_ok=True)
    Image.fromarray(array).save(path := Path(folder, f"{name}.png"))
    return path.read_bytes()


def test_pictures_have_the_channels_of_the_network(nets):
    rgba = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)
    data = png(rgba, "colour")
    found = {c: decode(data, (6, 9), where="x", channels=c) for c in (1, 3, 4)}
    assert np.array_equal(found[4], rgba)
    assert np.array_equal(found[3], rgba[..., :3])
    assert abs(found[1][..., 0] - rgba[..., :3] @ [0.299, 0.587, 0.114]).max() <= 1
    deep = np.arange(54, dtype=np.uint16).reshape(6, 9) * 1200  # 16-bit grey is not cut off
    assert np.array_equal(
        decode(png(deep, "deep"), (6, 9), where="x", channels=1)[..., 0], deep >> 8
    )
    for channels in (1, 4):
        assert open_data("colour", size=(channels, 4, 6)).train.read([0]).shape[1:] == (
            4, 6, channels
        )  # fmt: skip
    with pytest.raises(DataError, match=r"files of images give 1, 3 or 4 channels .* takes 5"):
        open_data("colour", size=(5, 4, 6))
    digits = open_data("digits", size=(1, 8, 8)).train.read([0, 1])
    assert np.array_equal(digits, open_data("digits", size=(8, 8)).train.read([0, 1])[..., :1])


# --- on the command line ----------------------------------------------------------------------

SHAPES = "--input-shape image=3,8,12 --input-shape ids=6:int64 --input-shape mask=6:bool"


def test_two_inputs_and_a_dict_of_outputs_all_the_way(nets, capsys):
    torch.save(nets.two().state_dict(), "two.pth")
    np.savez("two.npz", image=nets.picture, ids=nets.ids, mask=nets.mask)
    told = run(capsys, f"analyze two.pth --model some_nets:two {SHAPES} --data two.npz -o r "
               "--output scores=classes --num-calib 16")  # fmt: skip
    assert "image 3,8,12, ids 6:int64, mask 6:bool" in told
    assert "outputs: boxes regression, scores classes, top exact" in told
    policy = Policy.load("r/policy.yaml")
    assert policy.outputs == {"boxes": "regression", "scores": "classes", "top": "exact"}
    assert policy.model is not None
    assert list(map(str, policy.model.inputs.values())) == ["3,8,12", "6:int64", "6:bool"]
    run(capsys, "ptq --policy r --effort fast --output boxes=ignored")
    run(capsys, "export r --output top=ignored")
    verified = {
        o["name"]: o["kind"] for o in json.loads(Path("r/verify.json").read_text())["outputs"]
    }
    assert verified == {"boxes": "ignored", "scores": "classes", "top": "ignored"}
    assert run(capsys, "verify r").count("scores (classes) agreement 100.00%") == 1
    assert "agreement with the float file" in run(
        capsys, "bench r --runs 2 --output scores=classes"
    )
    assert "did you mean boxes" in refused(capsys, "bench r --output boxs=regression")
    run(capsys, "verify r/model.onnx --exact --data two.npz --num-test 2")
    (plain, row) = map(json.loads, Path("r/bench.jsonl").read_text().splitlines())
    assert "agreement" not in plain
    assert (row["top1"], row["compared"], row["sqnr_db"]) == (None, 8, None)
    assert row["agreement"] > 70


def test_what_is_wrong_with_inputs_and_outputs_is_said(nets, capsys):
    torch.save(nets.two().state_dict(), "two.pth")
    analyze = "analyze two.pth --model some_nets:two -o r"
    shapes = SHAPES.rsplit(" --input-shape", 1)[0]
    for more, message in {
        "--data none": "must fit Two.forward(image, ids, mask=None, scale=2.0): missing a required",
        "--input-shape image=3,8,12": "missing a required argument: 'ids'",
        shapes.replace("image=", "imag="): "did you mean image",
        shapes.replace("image=3", "image=4"): "must run on inputs of shapes [4, 8, 12], [6]",
        f"{shapes} --output boxs=regression": "Got output 'boxs'; did you mean boxes",
        f"{shapes} --output boxes=regresion": "Got 'boxes=regresion'; did you mean regression",
        f"{shapes} --output boxes": "must be NAME=KIND",
        f"{shapes} --output top=classes": "Got whole numbers ['N']. Try --output top=exact.",
        f"{shapes} --data digits": "to be given digits. It takes image, ids.",
    }.items():
        assert message in refused(capsys, f"{analyze} {more}")


@pytest.mark.parametrize(
    ("make", "more"),
    [
        ("one", "--input-shape x=2,30"),
        ("three", "--input-shape 2,6,6,7"),
        ("stated", ""),
        ("grey", "--input-shape 1,6,9 --data pictures --normalize 0.5/0.25"),
        ("rgba", "--input-shape 4,6,9 --data pictures --normalize none"),
    ],
)
def test_other_inputs_all_the_way(nets, capsys, make, more):
    channels = {"grey": 1, "rgba": 4}.get(make)
    net = nets.images(channels) if channels else getattr(nets, make)()
    torch.save(net.state_dict(), "net.pth")
    for number in range(12 if channels else 0):
        png(np.random.default_rng(number).integers(0, 256, (6, 9, 4), dtype=np.uint8), "pictures",
            str(number))  # fmt: skip
    model = "images" if channels else make
    run(capsys, f"analyze net.pth --model some_nets:{model} {more} -o r --metric sqnr")
    run(capsys, "ptq --policy r --effort fast --num-calib 16")
    if LONG:  # an export takes seconds, and that of such networks is tested in test_trees.py
        run(capsys, "export r --num-test 16")
        assert "samples" in run(capsys, "bench r --runs 2 --num-test 16")


def test_grey_networks_are_trained_on_grey_pictures(nets, capsys):
    train = "train some_nets:grey --data digits --epochs 1 --set batch=512 -o net.pth --force"
    for more in ("--recipe strong", "--set rand_operations=2"):
        run(capsys, f"{train} {more}")
    info = torch.load("net.pth", weights_only=True)["info"]
    assert (info["input"], info["normalize"]) == ([1, 6, 9], "none")


# --- in Python --------------------------------------------------------------------------------


def test_batches_of_a_training_loop_all_the_way(nets, tmp_path):
    items = [{"image": torch.tensor(nets.picture[i]), "ids": torch.tensor(nets.ids[i])}
             for i in range(40)]  # fmt: skip
    loader, net = DataLoader(items, batch_size=8), nets.two().eval()
    found = mpq.analyze(net, loader, budget=6, num_calib=16, outputs={"scores": "classes"})
    quantized = mpq.ptq(net, loader, found, effort="fast", num_calib=16)
    assert quantized.policy.outputs["scores"] == "classes"
    quantized.save("q.pth")
    again = mpq.Quantized.load("q.pth", net)
    made = mpq.export(again, "m.onnx", data=loader, outputs={"top": "ignored"})
    assert made.verification is not None
    assert [o.kind for o in made.verification.outputs] == ["regression", "classes", "ignored"]
    trained = mpq.qat(net, loader, found, epochs=1, settings={"batch": 16})  # taught by itself
    assert trained.metrics["teachers"] == ["the float network"]
    (row,) = mpq.bench("m.onnx", loader, runs=2).rows
    assert (row.top1, row.compared) == (None, 0)  # there is no float file to compare with
    with pytest.raises(UsageError, match="Got output 'score'; did you mean scores"):
        mpq.analyze(net, loader, outputs={"score": "classes"})


def test_labels_of_a_signal_are_measured(nets):
    net, x = nets.one().eval(), torch.randn(40, 2, 30)
    labels = net(x).argmax(1)
    assert mpq.ptq(net, [(x, labels)], effort="fast", num_calib=24).metrics["validation_top1"] > 90


def test_how_a_network_is_called_with_a_batch(nets):
    net, (image, ids) = nets.two(), (torch.tensor(nets.picture), torch.tensor(nets.ids))
    for batch in ({"image": image, "ids": ids, "labels": ids[:, 0]}, (image, ids, ids[:, 0])):
        assert list(called(net, batch).inputs) == ["image", "ids"]
    assert called(nets.images(), (image, ids[:, 0])) is None
    assert called(nets.images(), {"pixel_values": image}) is None
    assert list(called(nets.one(), (torch.zeros(2, 2, 30), torch.zeros(2))).inputs) == ["x"]
    with pytest.raises(GraphError, match=r"must fit Two.forward.* missing a required argument"):
        called(net, {"image": image})
