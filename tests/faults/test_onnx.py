"""Model files of a few bytes that ask for any memory, or never end: refused before they are run."""

from __future__ import annotations

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mpq.cli import main
from mpq.errors import ExportError
from mpq.export import runtime, trial
from mpq.limits import limited

Tell = Callable[[str, str], None]
VALUES = 10**9
"""Of float32: 4 GB."""
Node, Tensor = onnx.NodeProto, onnx.TensorProto
node = helper.make_node


def ints(name: str, *values: int, rank: int = 1) -> Tensor:
    return helper.make_tensor(name, TensorProto.INT64, [len(values)] * rank, values)


def floats(name: str, *shape: int) -> Tensor:
    return helper.make_tensor(name, TensorProto.FLOAT, shape, np.ones(shape).ravel())


def model(
    nodes: Sequence[Node],
    weights: Sequence[Tensor] = (),
    sparse: Sequence[onnx.SparseTensorProto] = (),
    functions: Sequence[onnx.FunctionProto] = (),
    last: str = "b",
) -> onnx.ModelProto:
    """A classifier of images that also adds the mean of the tensor `last`."""
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    own = [
        node("Cast", [last], ["f"], to=TensorProto.FLOAT),
        node("ReduceMean", ["f"], ["c"], keepdims=0),
        node("ReduceMean", ["x"], ["m"], axes=[2, 3], keepdims=0),
        node("Add", ["m", "c"], ["y"]),
    ]
    graph = helper.make_graph(
        [*nodes, *own], "net", [image], [answer], list(weights), sparse_initializer=list(sparse)
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
    return helper.make_model(
        graph, opset_imports=sets, ir_version=9, functions=list(functions), producer_name="other"
    )


def filled(operator: str) -> onnx.ModelProto:
    shape = ["s"] if operator == "ConstantOfShape" else ["o", "s"]
    return model([node(operator, shape, ["b"])], [ints("s", VALUES), floats("o", 1)])


def doubled() -> onnx.ModelProto:
    chain = [node("Concat", [f"d{k}"] * 2, [f"d{k + 1}"], axis=0) for k in range(30)]
    return model(chain, [floats("d0", 1)], last="d30")


def followed() -> onnx.ModelProto:
    """Small for the runtime, but 400 bytes a value for whoever follows its shapes."""
    chain = [node("Concat", [f"d{k}"] * 2, [f"d{k + 1}"], axis=0) for k in range(22)]
    return model(chain, [ints("d0", 1)], last="d22")


def looped() -> onnx.ModelProto:
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [node("Concat", ["c", "c"], ["d"], axis=0), node("Identity", ["k"], ["l"])],
        "body",
        [info("i", TensorProto.INT64, []), info("k", TensorProto.BOOL, []), info("c", 1, None)],
        [info("l", TensorProto.BOOL, []), info("d", 1, None)],
    )
    true = helper.make_tensor("true", TensorProto.BOOL, [], [True])
    return model(
        [node("Loop", ["trips", "true", "o"], ["b"], body=body)],
        [ints("trips", 30, rank=0), true, floats("o", 1)],
    )


def ranged() -> onnx.ModelProto:
    ends = [ints(n, v, rank=0) for n, v in (("a", 0), ("s", VALUES // 2), ("d", 1))]
    return model([node("Range", ["a", "s", "d"], ["b"])], ends)


def outer() -> onnx.ModelProto:
    return model([node("Add", ["p", "q"], ["b"])], [floats("p", 32000, 1), floats("q", 1, 32000)])


def sparse() -> onnx.ModelProto:
    one = helper.make_sparse_tensor(floats("b", 1), ints("bi", 5), [VALUES // 4])
    return model([], sparse=[one])


def of_the_image() -> onnx.ModelProto:
    """Of no constant: it is the first run that asks for the memory."""
    nodes = [node("ReduceMean", ["x"], ["r"], keepdims=0), node("Expand", ["r", "s"], ["b"])]
    return model(nodes, [ints("s", VALUES)])


def strided() -> onnx.ModelProto:
    nodes = [node("ConvTranspose", ["o", "w"], ["b"], strides=[20_000, 20_000])]
    return model(nodes, [floats("o", 1, 1, 2, 2), floats("w", 1, 1, 1, 1)])


def resized() -> onnx.ModelProto:
    scales = helper.make_tensor("s", TensorProto.FLOAT, [4], [1, 1, 3e4, 3e4])
    return model([node("Resize", ["o", "", "s"], ["b"])], [scales, floats("o", 1, 1, 1, 1)])


def windowed() -> onnx.ModelProto:
    """A convolution whose image with its windows side by side has 2 GB."""
    nodes = [node("Conv", ["o", "w"], ["b"])]
    return model(nodes, [floats("o", 1, 3, 300, 300), floats("w", 1, 3, 120, 120)])


MEMORY: dict[str, Callable[[], onnx.ModelProto]] = {
    "ConstantOfShape": lambda: filled("ConstantOfShape"),
    "Expand": lambda: filled("Expand"),
    "Tile": lambda: filled("Tile"),
    "Range": ranged,
    "Concat of itself": doubled,
    "Loop": looped,
    "broadcast": outer,
    "sparse": sparse,
    "of the image": of_the_image,
    "ConvTranspose": strided,
    "Resize": resized,
    "shapes": followed,
}
SHORT = ("Expand", "Loop", "sparse", "of the image")
COMMANDS = [
    "certify m.onnx",
    "verify m.onnx --exact",
    "bench m.onnx --data none --runs 2",
    "bench fine.onnx --float m.onnx --data none --runs 2",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", MEMORY)
def test_a_file_that_unfolds_is_refused_before_it_is_run(
    kind: str, tell: Tell, tries: Callable[[int, int], range], capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(MEMORY[kind](), "m.onnx")
    onnx.save(model([], [floats("b", 1)]), "fine.onnx")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in tries(1 if kind in SHORT else 0, len(COMMANDS)):
        assert main(COMMANDS[index].split()) == 2
        assert "m.onnx exceeds the limit onnx-mb=500: loading" in capsys.readouterr().err
        tell("ONNX files that unfold", "refused")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150_000  # kB
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 1_000_000


def functions() -> onnx.ModelProto:
    """Each of twelve functions calls the one before ten times."""
    made = []
    for k in range(12):
        calls = [node(f"f{k - 1}", [f"t{j}"], [f"t{j + 1}"], domain="f") for j in range(10)]
        inner = calls if k else [node("Add", ["t0", "t0"], ["t10"])]
        nodes = [node("Identity", ["a"], ["t0"]), *inner, node("Identity", ["t10"], ["z"])]
        sets = [helper.make_opsetid("", 17), helper.make_opsetid("f", 1)]
        made.append(helper.make_function("f", f"f{k}", ["a"], ["z"], nodes, sets))
    return model([node("f11", ["o"], ["b"], domain="f")], [floats("o", 1)], functions=made)


@pytest.mark.usefixtures("place")
def test_functions_that_multiply_are_refused() -> None:
    onnx.save(functions(), "m.onnx")
    told = pytest.raises(ExportError, match=r"limit onnx-(seconds=1|mb=500)")
    with limited(onnx_seconds=1), told:
        runtime.session("m.onnx")


@pytest.mark.usefixtures("place")
def test_limits_of_memory_can_be_raised() -> None:
    nodes = [node("ReduceMean", ["x"], ["r"], keepdims=0), node("Expand", ["r", "s"], ["b"])]
    onnx.save(model(nodes, [ints("s", 6_000_000)]), "m.onnx")
    with limited(onnx_mb=20), pytest.raises(ExportError, match="limit onnx-mb=20"):
        runtime.session("m.onnx")
    runtime.session("m.onnx")


@pytest.mark.usefixtures("place")
def test_what_is_small_is_seen_without_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_try", lambda *_: pytest.fail("tried"))
    weights = [floats("w", 4, 3, 3, 3), ints("s", -1, 4)]
    pooled = node("GlobalAveragePool", ["a"], ["p"])
    nodes = [node("Conv", ["x", "w"], ["a"]), pooled, node("Reshape", ["p", "s"], ["b"])]
    onnx.save(model(nodes, weights), "m.onnx")
    runtime.session("m.onnx")
    onnx.save(windowed(), "wide.onnx")
    with pytest.raises(pytest.fail.Exception):
        runtime.session("wide.onnx")


@pytest.mark.usefixtures("place")
def test_weights_outside_are_files(place: Path) -> None:
    found = model([], [floats("b", 4)])
    tensor = found.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.raw_data = b""
    tensor.data_location = TensorProto.EXTERNAL
    for name, value in (("location", "zero"), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=name, value=value)
    (place / "m.onnx").write_bytes(found.SerializeToString())
    (place / "zero").symlink_to("/dev/zero")
    with pytest.raises(ExportError, match="zero must be a regular file"):
        runtime.session("m.onnx")
