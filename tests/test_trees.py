"""Networks with several inputs and outputs of any kind, from the module to the file that runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpq
from mpq import Policy
from mpq.calls import call, flat, leaves, take
from mpq.capture.network import Network
from mpq.errors import ExportError, GraphError, UsageError
from mpq.export import float_to_onnx, runtime, to_onnx
from mpq.graph.ir import QuantGraph

N = 24


def pictures(channels: int = 3, *size: int) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(N, channels, *(size or (8, 8)), generator=generator)


def whole(count: int, *size: int) -> Tensor:
    return torch.randint(count, (N, *size), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Layers that the networks below are made of."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(channels, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.depth, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(8, 5)
        self.table, self.mix = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.eval()

    def pooled(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(x))).mean((2, 3)))


class TwoInputs(Net):
    def forward(self, image: Tensor, depth: Tensor, scale: float = 1.0) -> Tensor:
        return self.pooled(self.a(image) + self.depth(depth)) * scale


class Halves(Net):
    """Two images through one encoder, one behind the other."""

    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        first, second = torch.chunk(self.a(torch.cat([image, other])), 2)
        return self.pooled(first + second)


class Parts(Net):
    def forward(self, image: Tensor, other: Tensor) -> Tensor:
        first, second = self.a(torch.cat([image, other])).split(image.shape[0])
        return self.pooled(first + second)


class Optional(Net):
    def forward(self, image: Tensor, depth: Tensor | None = None) -> Tensor:
        x = self.a(image)
        return self.pooled(x if depth is None else x + self.depth(depth))


class Nested(Net):
    def forward(self, parts: dict[str, Any], extra: tuple[int, Tensor]) -> Tensor:
        return self.pooled(self.a(parts["z"]) + self.depth(parts["a"][0]) + extra[1])


class Dict(Net):
    def forward(self, x: Tensor) -> dict[str, Any]:
        f = F.relu(self.a(x))
        y = self.pooled(f)
        top = y.argmax(1)
        return {"logits": y, "features": [f, self.b(f)], "top": top, "none": None, "again": y,
                "x": x, "rows": x.shape[2]}  # fmt: skip


class Features(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        f = F.relu(self.a(x))
        return self.pooled(f), f


class Words(Net):
    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = F.relu(self.mix(self.table(ids)))
        return self.head(x if mask is None else x * mask.unsqueeze(-1)).mean(1)


class Raw(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.a(x.permute(0, 3, 1, 2).float() / 255))


class Clashing(Net):
    """Outputs that are named as inputs, weights and values of the file are."""

    def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
        y = self.pooled(self.a(a) + self.a(b))
        return {"a": y, "weight": y + 1, "b": b, "head.weight": y * 2}


class Signal(nn.Module):
    """One, two or three dimensions after the channels."""

    def __init__(self, dimensions: int, channels: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        self.a, self.norm = conv(channels, 8, 3, padding=1), norm(8)
        self.b, self.head = conv(8, 8, 3, stride=2), nn.Linear(8, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(F.relu(self.norm(self.a(x))))).flatten(2).mean(2))


IMAGE, DEPTH, IDS, MASK = pictures(), pictures(1), whole(10, 6), whole(2, 6).bool()
PIXELS = whole(256, 8, 8, 3).to(torch.uint8)
CASES: dict[str, tuple[nn.Module, Any, list[str], list[str]]] = {
    "two inputs": (TwoInputs(), (IMAGE, DEPTH), ["image", "depth"], ["output"]),
    "default given": (TwoInputs(), (IMAGE, DEPTH, 0.5), ["image", "depth"], ["output"]),
    "keywords": (
        TwoInputs(), {"depth": DEPTH, "image": IMAGE}, ["depth", "image"], ["output"]
    ),
    "halves": (Halves(), (IMAGE, pictures(4)[:, :3]), ["image", "other"], ["output"]),
    "left out": (Optional(), IMAGE, ["input"], ["output"]),
    "optional": (Optional(), {"image": IMAGE, "depth": DEPTH}, ["image", "depth"], ["output"]),
    "nested": (
        Nested(), ({"z": IMAGE, "a": [DEPTH]}, (3, IMAGE[:, :1])),
        ["parts.z", "parts.a.0", "extra.1"], ["output"],
    ),
    "dict": (
        Dict(), IMAGE, ["input"],
        ["logits", "features.0", "features.1", "top", "again", "x"],
    ),
    "tuple": (Features(), (IMAGE,), ["input"], ["output.0", "output.1"]),
    "indices": (Words(), IDS, ["input"], ["output"]),
    "mask": (Words(), {"ids": IDS, "mask": MASK}, ["ids", "mask"], ["output"]),
    "uint8": (Raw(), PIXELS, ["input"], ["output"]),
    "clashing": (
        Clashing(), (IMAGE, pictures(4)[:, :3]), ["a", "b"],
        ["output.a", "weight", "output.b", "head.weight"],
    ),
    "1-d": (Signal(1, 4), pictures(4, 20), ["input"], ["output"]),
    "3-d": (Signal(3, 1), pictures(1, 5, 6, 7), ["input"], ["output"]),
    "grey": (Signal(2, 1), pictures(1, 9, 12), ["input"], ["output"]),
    "four channels": (Signal(2, 4), pictures(4, 12, 9), ["input"], ["output"]),
    "three columns": (Signal(2, 2), pictures(2, 9, 3), ["input"], ["output"]),
}  # fmt: skip


def quantized(net: nn.Module, inputs: Any, effort: Any = "fast") -> QuantGraph:
    graph = mpq.prepare(mpq.to_float(net, take(inputs, slice(2))), Policy.uniform(8))
    return mpq.quantize_graph(graph, inputs, effort=effort)


@pytest.mark.parametrize("name", CASES)
def test_every_input_and_output_is_in_the_file_and_right(name: str, tmp_path: Path):
    net, inputs, names, outputs = CASES[name]
    graph = quantized(net, inputs)
    path = to_onnx(graph, tmp_path / "m.onnx", images=inputs).path
    proto = onnx.load(path)
    assert [value.name for value in proto.graph.input] == names
    assert [value.name for value in proto.graph.output] == outputs
    frozen = mpq.freeze(graph)
    given = [t.numpy() for t in flat(frozen.module, inputs)]
    found = runtime.answers(runtime.session(path), given, batch=10)
    with torch.no_grad():
        wanted, floats = leaves(call(frozen.module, inputs)), leaves(call(net, inputs))
    assert list(floats) == list(wanted)
    for (key, value), answer in zip(wanted.items(), found.values(), strict=True):
        assert answer.dtype == value.numpy().dtype
        if value.is_floating_point():
            np.testing.assert_allclose(answer, value, atol=0.05 * float(value.abs().max()))
            assert (floats[key] - value).abs().mean() < 0.1 * floats[key].abs().mean()
        else:
            assert np.array_equal(answer, value)


def test_whole_numbers_and_masks_are_not_rounded():
    graph = quantized(*CASES["mask"][:2])
    readers = {site.node for site in graph.sites.values()}
    assert not readers & graph.exact
    assert "mask" in graph.exact


@pytest.mark.parametrize("effort", ["good", "best"])
def test_higher_efforts_take_trees(effort: str):
    net, inputs = CASES["nested"][:2]
    learning = mpq.ptq.Learning(iterations=5)
    graph = mpq.prepare(mpq.to_float(net, take(inputs, slice(2))), Policy.uniform(4, 8))
    mpq.quantize_graph(graph, inputs, effort=effort, learning=learning)
    with torch.no_grad():
        wanted, found = net(*inputs), call(graph.module, inputs)
    assert (wanted - found).abs().mean() < 0.3 * wanted.abs().mean()


def test_a_network_is_an_example_and_norms_and_equalization_take_trees():
    net, inputs = CASES["two inputs"][:2]
    network = Network(net, (IMAGE[:2],), {"depth": DEPTH[:2], "scale": 2.0})
    graph = mpq.to_float(net, network)
    assert graph.inputs == ("image", "depth")
    assert torch.allclose(call(graph.module, inputs), 2 * net(*inputs), atol=1e-5)
    mpq.ptq.equalize(graph, inputs, Policy.uniform(8), mode="on")
    assert torch.allclose(call(graph.module, inputs), 2 * net(*inputs), atol=1e-4)
    prepared = mpq.quantize_graph(mpq.prepare(graph, Policy.uniform(8)), inputs, effort="fast")
    assert mpq.attach_norms(prepared, inputs) == 0


def test_names_can_be_given(tmp_path: Path):
    graph = quantized(*CASES["tuple"][:2])
    names = {"input_names": ["pixels"], "output_names": ["scores", "map"]}
    path = to_onnx(graph, tmp_path / "m.onnx", images=IMAGE, **names).path
    assert list(runtime.answers(runtime.session(path), {"pixels": IMAGE.numpy()})) == [
        "scores", "map",
    ]  # fmt: skip
    loaded = mpq.to_float(Features(), IMAGE[:2])
    session = runtime.session(float_to_onnx(loaded, tmp_path / "f.onnx", **names))
    assert list(runtime.answers(session, IMAGE.numpy())) == ["scores", "map"]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"input_names": ["a", "b"]}, r"input names must be 1, one for each of input\. Got a, b"),
        ({"output_names": ["a"]}, r"output names must be 2, one for each of output\.0, output\.1"),
        ({"output_names": ["a", "a"]}, r"must differ and not be empty\. Got 'a'"),
        ({"output_names": ["input", "b"]}, r"must differ and not be empty\. Got 'input'"),
        ({"dynamic": ["batch", "depth"]}, r"among batch, height, width for .*Got 'depth'"),
    ],
)
def test_ends_that_the_network_does_not_have(asked: dict[str, Any], message: str, tmp_path: Path):
    graph = quantized(*CASES["tuple"][:2])
    with pytest.raises(UsageError, match=message):
        to_onnx(graph, tmp_path / "m.onnx", **asked)
    assert not (tmp_path / "m.onnx").exists()


class Skip(Net):
    """An encoder and a decoder that joins what it decodes with what it encoded."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        fine = F.relu(self.a(x))
        coarse = F.interpolate(F.max_pool2d(F.relu(self.b(fine)), 2), size=fine.shape[-2:])
        return self.b(fine + coarse) * mask[:, None], mask


class Branching(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.pooled(self.a(x))
        return y * 2 if x.shape[2] > 10 else y


class Counting(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.pooled(self.a(x)) * int(x.shape[3])


def test_free_sizes_run_and_are_verified_at_several(tmp_path: Path):
    inputs = (pictures(3, 8, 12), whole(2, 8, 12).bool())
    graph = quantized(Skip(), inputs)
    sizes = ("batch", "height", "width")
    path = to_onnx(graph, tmp_path / "m.onnx", images=inputs, dynamic=sizes).path
    session, frozen = runtime.session(path), mpq.freeze(graph)
    assert [one.shape for one in session.get_inputs()] == [
        ["batch", 3, "height", "width"], ["batch", "height", "width"],
    ]  # fmt: skip
    for height, width in ((8, 12), (20, 6), (6, 34)):
        other = pictures(3, height, width), whole(2, height, width).bool()
        wanted = frozen.module(*other)
        found = runtime.answers(session, [t.numpy() for t in other])
        assert np.allclose(found["output.0"], wanted[0], atol=0.05 * float(wanted[0].abs().max()))
        assert np.array_equal(found["output.1"], wanted[1])


def test_a_signal_has_a_free_length(tmp_path: Path):
    graph = quantized(*CASES["1-d"][:2])
    path = to_onnx(graph, tmp_path / "m.onnx", images=CASES["1-d"][1], dynamic=["length"]).path
    found = runtime.run(runtime.session(path), pictures(4, 33).numpy())
    wanted = mpq.freeze(graph).module(pictures(4, 33))
    assert np.allclose(found, wanted, atol=0.05 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("net", "message"),
    [
        (Branching(), r"height, width cannot be dynamic: on input .*goes another way there"),
        (Counting(), r"height, width cannot be dynamic: .*reads a size as a plain number"),
    ],
)
def test_sizes_that_the_example_decided_cannot_be_free(
    net: nn.Module, message: str, tmp_path: Path
):
    graph = quantized(net, IMAGE)
    assert graph.sizes
    with pytest.raises(GraphError, match=message):
        to_onnx(graph, tmp_path / "m.onnx", images=IMAGE, dynamic=["height", "width"])
    assert not (tmp_path / "m.onnx").exists()
    assert to_onnx(graph, tmp_path / "m.onnx", images=IMAGE).verification is not None


def test_an_input_without_samples_is_refused(tmp_path: Path):
    class Picture(Net):
        def forward(self, pictures: list[Tensor]) -> Tensor:
            mean = pictures[0].new_tensor([0.4, 0.5, 0.6])[:, None, None]
            return self.pooled(self.a((pictures[0] - mean)[None]))

    graph = mpq.to_float(Picture(), ([IMAGE[0]],))
    with pytest.raises(ExportError, match=r"must have the samples .* export backbone and heads"):
        float_to_onnx(graph, tmp_path / "m.onnx")


def test_a_batch_that_the_network_holds_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match=r"batch of input image must be free .* holds it at 2"):
        float_to_onnx(mpq.to_float(Parts(), (IMAGE[:2], IMAGE[2:4])), tmp_path / "m.onnx")


def test_a_network_of_one_size_has_no_free_sizes(tmp_path: Path):
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.all = nn.Linear(8 * 64, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.all(self.a(x).flatten(1))

    graph = quantized(Fixed().eval(), IMAGE)
    with pytest.raises(GraphError, match=r"height cannot be dynamic: the network runs on no other"):
        to_onnx(graph, tmp_path / "m.onnx", images=IMAGE, dynamic=["height"])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ((IMAGE[:2],), r"must fit TwoInputs\.forward.*missing a required argument: 'depth'"),
        ({"image": IMAGE[:2], "depths": DEPTH[:2]}, r"must fit TwoInputs\.forward"),
        ([IMAGE[:2], DEPTH[:2]], r"example must be a tensor, a tuple .*Got list"),
        ((3.0, 4.0), r"must hold a tensor"),
    ],
)
def test_examples_that_do_not_fit(example: Any, message: str):
    with pytest.raises(GraphError, match=message):
        mpq.to_float(TwoInputs(), example)


def test_batches_that_do_not_fit():
    with pytest.raises(UsageError, match=r"same first size\. Got image 2, depth 3"):
        mpq.to_float(TwoInputs(), (IMAGE[:2], DEPTH[:3]))
    graph = mpq.prepare(mpq.to_float(TwoInputs(), (IMAGE[:2], DEPTH[:2])), Policy.uniform(8))
    with pytest.raises(UsageError, match=r"same first size"):
        mpq.quantize_graph(graph, (IMAGE, DEPTH[:3]))
    with pytest.raises(UsageError, match=r"takes the inputs image, depth\. Got 1 by position"):
        mpq.quantize_graph(graph, IMAGE)


def test_a_file_refuses_other_arrays(tmp_path: Path):
    graph = quantized(*CASES["two inputs"][:2])
    session = runtime.session(to_onnx(graph, tmp_path / "m.onnx").path)
    image, depth = IMAGE.numpy(), DEPTH.numpy()
    for given, message in (
        ([image], r"takes the inputs image, depth\. Got 1 arrays"),
        ({"image": image, "mask": depth}, r"takes the inputs image, depth\. Got \['image', 'mask'"),
        ([image, image], r"input depth must be float32 of shape"),
        ([image, depth.astype(np.float64)], r"input depth must be float32 .*Got float64"),
    ):
        with pytest.raises(mpq.errors.DataError, match=message):
            runtime.answers(session, given)


def test_a_layer_that_reads_the_same_twice_is_one_layer(tmp_path: Path):
    class Twice(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.pooled(self.a(x)), self.a(x)

    graph = quantized(Twice().eval(), IMAGE)
    assert list(graph.layers) == ["a", "b", "head"]
    assert to_onnx(graph, tmp_path / "m.onnx", images=IMAGE).verification is not None
