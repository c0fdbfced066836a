"""Inputs and answers as trees: batches, names, and the arrays that a file takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mpq.calls import arguments, call, count, described, flat, leaves, split, take
from mpq.errors import UsageError

IMAGE, MASK = torch.randn(5, 3, 4, 4), torch.arange(5)


class Scaled(nn.Module):
    def forward(self, image: Tensor, mask: Tensor, factor: float = 2.0) -> Tensor:
        return image * mask[:, None, None, None] * factor


def graph_of(*names: str) -> fx.GraphModule:
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in names]
    graph.output(tuple(nodes))
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        (IMAGE, ["output"]),
        ((IMAGE, MASK), ["output.0", "output.1"]),
        ({"out": IMAGE, "aux": [MASK, {"z": MASK}]}, ["out", "aux.0", "aux.1.z"]),
        ({"loss": None, "logits": IMAGE, "size": 3}, ["logits"]),
        ([{"boxes": MASK, 1: IMAGE}], ["output.0.boxes", "output.0.1"]),
        (torch.max(IMAGE, 1), ["output.0", "output.1"]),
    ],
)
def test_leaves_have_dotted_names_in_order(answer: Any, names: list[str]):
    assert list(leaves(answer)) == names


@pytest.mark.parametrize("inputs", [IMAGE, (IMAGE, MASK), {"mask": MASK, "images": [IMAGE, 3.0]}])
def test_batches_are_of_the_same_kind_and_lose_nothing(inputs: Any):
    parts = split(inputs, 2)
    assert [count(part) for part in parts] == [2, 2, 1]
    for name, whole in leaves(inputs).items():
        assert torch.equal(torch.cat([leaves(part)[name] for part in parts]), whole)
    assert type(parts[0]) is type(inputs)
    assert torch.equal(next(iter(leaves(take(inputs, torch.tensor([3]))).values()))[0],
                       next(iter(leaves(inputs).values()))[3])  # fmt: skip


def test_a_tensor_without_dimensions_belongs_to_every_batch():
    parts = split((IMAGE, torch.tensor(0.5)), 3)
    assert [float(part[1]) for part in parts] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"image": IMAGE, "mask": MASK[:2]}, r"same first size. Got image 5, mask 2"),
        ([IMAGE], r"must be a tensor, a tuple .* or a dict .*Got list"),
        ((3.0,), r"Got tuple"),
    ],
)
def test_what_is_no_batch_is_refused(inputs: Any, message: str):
    with pytest.raises(UsageError, match=message):
        split(inputs, 2)


@pytest.mark.parametrize(
    "inputs", [(IMAGE, MASK), {"mask": MASK, "image": IMAGE}, (IMAGE, MASK, 2.0)]
)
def test_network_and_graph_are_called_alike(inputs: Any):
    graph = graph_of("image", "mask")
    assert torch.equal(call(Scaled(), inputs), Scaled()(IMAGE, MASK))
    assert [t is u for t, u in zip(call(graph, inputs), (IMAGE, MASK), strict=True)] == [True] * 2


def test_a_file_takes_the_tensors_in_the_order_of_the_placeholders():
    inputs = {"parts": {"z": MASK, "a": [IMAGE]}, "image": IMAGE}
    found = flat(graph_of("image", "parts"), inputs)
    assert [t is u for t, u in zip(found, (IMAGE, MASK, IMAGE), strict=True)] == [True] * 3


@pytest.mark.parametrize("inputs", [IMAGE, (IMAGE,), {"image": IMAGE, "masks": MASK}])
def test_other_inputs_than_a_graph_takes_are_refused(inputs: Any):
    with pytest.raises(UsageError, match=r"takes the inputs image, mask\. Got"):
        arguments(graph_of("image", "mask"), inputs)


def test_shapes_are_told_without_the_batch():
    assert described(IMAGE) == "an input of shape [3, 4, 4]"
    assert described({"a": IMAGE, "b": MASK}) == "inputs of shapes [3, 4, 4], []"
