"""Files of networks that are more than a classifier: verified output by output, by their kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.numpy_helper import to_array
from torch import Tensor, nn

from mpq import Policy, prepare, quantize_graph
from mpq.data import Normalization
from mpq.errors import DataError, ExportError
from mpq.export import runtime, to_onnx
from mpq.export.exact import verify_exact
from mpq.export.meta import from_metadata
from mpq.export.onnx_file import verify_file
from mpq.export.outputs import MIN_AGREEMENT
from mpq.export.verify import VerifyReport
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import to_float
from mpq.outputs import Tally
from mpq.train.evaluate import accuracy


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Detector(nn.Module):
    """Two boxes, class logits, a class map, the index of the class, and its own size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.cls, self.near, self.far = nn.Linear(8, 5), nn.Linear(8, 4), nn.Linear(8, 4)
        self.seg = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = F.relu(self.stem(x))
        v = f.amax((2, 3))
        logits = self.cls(v)
        return {
            "cls": logits,
            "near_box": self.near(v),
            "far_box": self.far(v),
            "seg": self.seg(f),
            "index": logits.argmax(1),
        }


KINDS = {
    "cls": "classes",
    "near_box": "regression",
    "far_box": "regression",
    "seg": "places",
    "index": "exact",
}
IMAGES = noise(64, 3, 8, 8, seed=1)


@cache
def made(folder: Path) -> tuple[QuantGraph, bytes, VerifyReport]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Detector().eval()
    graph = prepare(to_float(net, IMAGES[:2]), Policy.uniform(8))
    quantize_graph(graph, IMAGES, effort="fast")
    result = to_onnx(graph, folder / "model.onnx", images=IMAGES)
    assert result.verification is not None
    return graph, result.path.read_bytes(), result.verification


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("file")


def test_every_output_is_stated_by_its_kind(folder: Path) -> None:
    _, data, report = made(folder)
    assert {o.name: o.kind for o in report.outputs} == KINDS
    by_name = {o.name: o for o in report.outputs}
    assert [by_name[n].n for n in KINDS] == [64, 256, 256, 64 * 64, 64]
    for name in ("cls", "seg", "index"):
        assert by_name[name].agreement == by_name[name].agreement_unoptimized == 1.0
    for name in ("cls", "near_box", "far_box", "seg"):
        assert (by_name[name].sqnr_db or 0) > 30
    for name in ("near_box", "far_box"):
        assert by_name[name].agreement is None
        assert 0 <= (by_name[name].own_step or 0) < 0.1
    assert by_name["index"].sqnr_db is None
    assert by_name["index"].quantized
    told = json.loads(report.to_json())
    assert (told["top1_agreement"], told["logits_sqnr_db"]) == (None, None)
    assert [row["kind"] for row in told["outputs"]] == list(KINDS.values())
    policy = from_metadata(runtime.metadata(runtime.session(data)), "the file")
    assert policy is not None
    assert policy.outputs == KINDS


def test_large_maps_come_a_few_images_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, _, whole = made(folder)
    monkeypatch.setattr(Tally, "HELD", 100)
    monkeypatch.setattr("mpq.export.outputs.VALUES", 2000)
    found = verify_file(graph, folder / "model.onnx", IMAGES)
    assert [(o.n, o.agreement) for o in found.outputs] == [
        (o.n, o.agreement) for o in whole.outputs
    ]


Change = Callable[[onnx.ModelProto], None]


def swap(model: onnx.ModelProto) -> None:
    """The two boxes change places."""
    names = {"near_box": "far_box", "far_box": "near_box"}
    for node in model.graph.node:
        node.output[:] = [names.get(n, n) for n in node.output]


def after(name: str, *nodes: onnx.NodeProto) -> Change:
    """Put nodes between what gives an output and the output."""

    def change(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = [f"{name}.raw" if n == name else n for n in node.output]
            node.input[:] = [f"{name}.raw" if n == name else n for n in node.input]
        model.graph.node.extend(nodes)

    return change


def constant(name: str, values: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))


def gather(name: str, axis: int, indices: list[int]) -> Change:
    return after(
        name,
        constant(f"{name}.i", np.array(indices)),
        helper.make_node("Gather", [f"{name}.raw", f"{name}.i"], [name], axis=axis),
    )


def plus(name: str, value: Any) -> Change:
    return after(
        name,
        constant(f"{name}.c", value),
        helper.make_node("Add", [f"{name}.raw", f"{name}.c"], [name]),
    )


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        (swap, ["near_box", "far_box"]),
        (gather("seg", 3, list(range(7, -1, -1))), ["seg"]),  # flipped left to right
        (gather("seg", 1, [1, 2, 0]), ["seg"]),  # classes one off
        (gather("cls", 1, [4, 0, 1, 2, 3]), ["cls"]),
        (plus("index", np.array(1)), ["index"]),  # off by one
        (plus("near_box", np.array([0, 0, 9.0, 0], np.float32)), ["near_box"]),
        (plus("far_box", np.array([0, 0, np.nan, 0], np.float32)), ["far_box"]),
    ],
    ids=["swapped", "flipped", "classes", "logits", "index", "box", "nan"],
)
def test_a_broken_output_fails_by_its_name(
    folder: Path, tmp_path: Path, change: Change, broken: list[str]
) -> None:
    graph, data, _ = made(folder)
    model = onnx.load_from_string(data)
    change(model)
    path = tmp_path / "broken.onnx"
    path.write_bytes(model.SerializeToString())
    told = verify_file(graph, path, IMAGES).failures()
    named = {text.split()[1] for text in told if text.startswith("output ")}
    assert named == set(broken), told


class Tipping(nn.Module):
    """Classes that turn around with the last bit of a pixel in the middle of the picture."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.cls, self.gain = nn.Linear(192, 5), gain

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"cls": torch.sin(self.gain * self.cls(x.flatten(1)))}


@pytest.mark.parametrize("gain", [0.1, 1e3])
def test_what_the_network_makes_of_a_single_step_is_measured(tmp_path: Path, gain: float) -> None:
    torch.manual_seed(0)
    graph = prepare(to_float(Tipping(gain).eval(), IMAGES[:2]), Policy.uniform(8))
    quantize_graph(graph, IMAGES, effort="fast")
    path = to_onnx(graph, tmp_path / "model.onnx", images=IMAGES).path
    model = onnx.load_from_string(path.read_bytes())
    (wave,) = (t for t in model.graph.initializer if np.array_equal(to_array(t), np.float32(gain)))
    wave.CopyFrom(numpy_helper.from_array(np.float32(-gain), wave.name))
    path.write_bytes(model.SerializeToString())
    *_, told = verify_file(graph, path, IMAGES).failures()
    (measured,) = re.findall(r"one such step at one integer of the input takes .* (\S+) dB", told)
    assert float(measured) < 10 if gain == 1e3 else float(measured) > 30


class Empty(Detector):
    """Nothing in its pictures tells two of the three classes of its map apart."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.seg.weight[1], self.seg.bias[1] = self.seg.weight[0], self.seg.bias[0]


@pytest.mark.parametrize(("steps", "fails"), [([-0.9, 0, 0], False), ([0, 0, 80], True)])
def test_a_tie_among_places_may_be_broken_either_way_and_a_choice_may_not(
    tmp_path: Path, steps: list[float], fails: bool
) -> None:
    torch.manual_seed(0)
    graph = prepare(to_float(Empty().eval(), IMAGES[:2]), Policy.uniform(8))
    quantize_graph(graph, IMAGES, effort="fast")
    path = to_onnx(graph, tmp_path / "model.onnx", images=IMAGES).path
    model = onnx.load_from_string(path.read_bytes())
    step = graph.module.get_submodule("quantizers.seg").step().item()  # type: ignore[operator]
    change = plus("seg", step * np.array(steps, np.float32).reshape(1, 3, 1, 1))
    change(model)
    path.write_bytes(model.SerializeToString())
    want = graph.module(IMAGES)["seg"]
    have = torch.from_numpy(runtime.answers(runtime.session(path), IMAGES.numpy())["seg"])
    assert float((want.argmax(1) == have.argmax(1)).float().mean()) < MIN_AGREEMENT
    told = [text for text in verify_file(graph, path, IMAGES).failures() if "seg" in text]
    assert bool(told) == fails, told


def test_an_output_of_another_shape_or_name_is_refused(folder: Path, tmp_path: Path) -> None:
    graph, data, _ = made(folder)
    model, path = onnx.load_from_string(data), tmp_path / "broken.onnx"
    gather("near_box", 1, [0, 1, 2])(model)
    for i, o in enumerate(model.graph.output):
        if o.name == "near_box":
            model.graph.output[i].CopyFrom(
                helper.make_tensor_value_info("near_box", TensorProto.FLOAT, [None, 3])
            )
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"output near_box of the file must have shape \[64, 4\]"):
        verify_file(graph, path, IMAGES)
    model = onnx.load_from_string(data)
    model.graph.output.pop()
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match=r"has no output index\. Got cls, near_box, far_box, seg"):
        verify_file(graph, path, IMAGES)


class Sized(nn.Module):
    """Depth, and the size of the picture: no layer touches the second."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.depth(x), (x > 0).sum((1, 2, 3))


def test_what_no_layer_touches_must_be_equal(tmp_path: Path) -> None:
    torch.manual_seed(0)
    graph = prepare(to_float(Sized().eval(), IMAGES[:2]), Policy.uniform(8))
    quantize_graph(graph, IMAGES, effort="fast")
    result = to_onnx(graph, tmp_path / "model.onnx", images=IMAGES)
    assert result.verification is not None
    depth, count = result.verification.outputs
    assert (depth.kind, count.kind, count.quantized, count.agreement) == (
        "regression", "exact", False, 1.0,
    )  # fmt: skip
    assert depth.own_step == 0.0  # on the grid of the last quantizer, to the bit
    model = onnx.load_from_string(result.path.read_bytes())
    wrong = IMAGES.clone()
    name = model.graph.output[1].name
    # One count in 64 is off by one: a class might be, an exact output may not.
    other = after(
        name,
        constant("one", np.array([1])),
        constant("where", np.array([[3]])),
        helper.make_node("ScatterND", [f"{name}.raw", "where", "one"], [name], reduction="add"),
    )
    other(model)
    (tmp_path / "broken.onnx").write_bytes(model.SerializeToString())
    (text, *_) = verify_file(graph, tmp_path / "broken.onnx", wrong).failures()
    assert text.startswith("output output.1 (exact): agreement is 0.9844, must be at least 1.0000")


def test_a_kind_that_was_given_judges(tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {"cls": "ignored", "seg": "regression"}
    graph = prepare(to_float(Detector().eval(), IMAGES[:2], given), Policy.uniform(8))
    quantize_graph(graph, IMAGES, effort="fast")
    report = to_onnx(graph, tmp_path / "model.onnx", images=IMAGES).verification
    assert report is not None
    found = {o.name: o for o in report.outputs}
    assert (found["cls"].kind, found["cls"].n, found["cls"].sqnr_db) == ("ignored", 0, None)
    assert found["seg"].agreement is None
    assert found["seg"].own_step == 0.0


# -- anybody's graph ---------------------------------------------------------------------------


def test_every_output_of_a_file_is_held_against_the_reference(folder: Path) -> None:
    _, data, _ = made(folder)
    report = verify_exact(data, IMAGES[:4].numpy())
    assert report.exact
    assert report.n == 4


def foreign(answer: list[int | str], batch: int | str) -> onnx.ModelProto:
    """A classifier of somebody's: its batch may be fixed, its answer may have no batch."""
    weight = numpy_helper.from_array(noise(12, 10).numpy(), "w")
    shape = numpy_helper.from_array(
        np.array([d if isinstance(d, int) else -1 for d in answer]), "s"
    )
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("MatMul", ["f", "w"], ["z"]),
        helper.make_node("Reshape", ["z", "s"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, answer)],
        [weight, shape],
    )
    opset = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opset, ir_version=8)


@pytest.mark.parametrize(
    ("answer", "batch"), [([10], 1), ([1, 10], 1), (["N", 10, 1, 1], "N"), ([4, 10], 4)]
)
def test_anybodys_classifier_is_judged(answer: list[int | str], batch: int | str) -> None:
    data = foreign(answer, batch).SerializeToString()
    count = batch if isinstance(batch, int) else 5
    assert verify_exact(data, noise(count, 3, 2, 2).numpy()).same_output
    logits = runtime.run(runtime.session(data), noise(9, 3, 2, 2).numpy())
    assert logits.shape == (9, 10)
    expected = noise(9, 3, 2, 2).flatten(1) @ noise(12, 10)
    assert np.allclose(logits, expected.numpy(), atol=1e-5)


def test_a_fixed_batch_takes_that_many() -> None:
    data = foreign([4, 10], 4).SerializeToString()
    with pytest.raises(DataError, match=r"runs 4 images at a time\. Got 3"):
        verify_exact(data, noise(3, 3, 2, 2).numpy())


# -- top-1 -------------------------------------------------------------------------------------


def test_top1_of_a_network_that_is_convolutions_throughout() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1))
    images = np.random.default_rng(0).integers(0, 255, (270, 8, 8, 3), np.uint8)
    labels, how = np.random.default_rng(1).integers(0, 3, 270), Normalization.parse("none")
    flat = nn.Sequential(net, nn.Flatten())
    assert accuracy(net, images, labels, how) == accuracy(flat, images, labels, how)


@pytest.mark.parametrize("net", [nn.Conv2d(3, 4, 3), Detector()])
def test_top1_of_other_answers_is_refused(net: nn.Module) -> None:
    images, labels = np.zeros((3, 8, 8, 3), np.uint8), np.zeros(3, np.int64)
    with pytest.raises(DataError, match=r"top-1 needs .* \[N, classes\] .* Got \{.*'(output|cls)'"):
        accuracy(net, images, labels, Normalization.parse("none"))
