"""The size that the search promises is the size of the file."""

from __future__ import annotations

import functools

import pytest
import torch

from mpq import zoo
from mpq.analyze import cost
from mpq.export.lower import lower
from mpq.export.onnx_file import serialize
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.policy import LayerPolicy, ModelInfo, Policy
from mpq.ptq import quantize_graph
from mpq.spec import activation_spec, weight_spec
from mpq.targets import ONNXRUNTIME_CPU

MIXTURES: dict[str, tuple[int, ...]] = {
    "8/4": (8, 4, 4),
    "16": (16,),
    "packed": (2, 3, 5, 6),
    "all": (16, 8, 6, 5, 4, 3, 2),
}


@functools.cache
def network() -> tuple[QuantGraph, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        images = torch.randn(4, 3, 32, 32)
        return to_float(zoo.build("resnet20_conv", 10).eval(), images[:2]), images


@pytest.mark.parametrize("name", MIXTURES)
def test_predicted_bytes_are_those_of_the_file(name: str) -> None:
    graph, images = network()
    widths = {n: MIXTURES[name][i % len(MIXTURES[name])] for i, n in enumerate(graph.layers)}
    policy = Policy(
        model=ModelInfo(arch="resnet20_conv", checkpoint="model.pth", sha256="0" * 64, classes=10),
        layers=[
            LayerPolicy(
                name=n, weight=weight_spec(b), activation=activation_spec(16 if b == 16 else 8)
            )
            for n, b in widths.items()
        ],
    )
    prepared = quantize_graph(prepare(graph, policy), images, method="minmax", effort="fast")
    real = len(serialize(lower(freeze(prepared))))
    pairs = {n: (b, 16 if b == 16 else 8) for n, b in widths.items()}
    predicted = cost.predicted_bytes(graph.layers.values(), pairs, ONNXRUNTIME_CPU, graph.besides)
    assert predicted == pytest.approx(real, rel=0.01)
