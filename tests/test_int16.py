"""16-bit layers in the form `exact`: what the policy says is what the runtime rounds."""

from __future__ import annotations

from pathlib import Path

import nets
import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from mpq.errors import ExportError, PolicyError
from mpq.export import place, runtime, to_onnx
from mpq.export.certify import certify
from mpq.export.onnx_file import verify_file
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.numerics import sqnr_db
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.quant.fake_quant import FakeQuant
from mpq.spec import ROUNDED_16, activation_spec, weight_spec
from mpq.wide import take_form

EXACT = take_form(Policy.uniform(16), "exact")
NETS = ("residual", "se_hardsigmoid", "pre_activation", "attention")
U16 = onnx.TensorProto.UINT16
MIN_SQNR_DB = 90.0
"""Of answers: 16-bit layers reach 100 dB and more, one with 8-bit weights some 40."""


def quantized(net: nn.Module, policy: Policy = EXACT) -> QuantGraph:
    graph = prepare(net, policy, nets.images())
    calibrate(graph, nets.images(16), method="minmax")
    return graph


def mixed(net: str, layers: dict[str, str]) -> QuantGraph:
    """W8A8 but for the layers given, which are `exact` or `fast`."""
    wide = {"exact": ROUNDED_16, "fast": activation_spec(16)}
    entries = [
        LayerPolicy(name=n, weight=weight_spec(16), activation=wide[form])
        for n, form in layers.items()
    ]
    return prepare(nets.build(net), Policy(layers=entries), nets.images())


def bits(graph: QuantGraph) -> dict[str, int]:
    return {site.node: site.spec.bits for site in graph.sites.values()}


def roundings(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """QuantizeLinear nodes to uint16."""
    wide = {t.name for t in model.graph.initializer if t.data_type == U16}
    return [n for n in model.graph.node if n.op_type == "QuantizeLinear" and n.input[2] in wide]


def answers(data: bytes, images: Tensor) -> dict[str, Tensor]:
    modes = {"default": True, "plain": False}
    return {
        name: torch.from_numpy(runtime.run(runtime.session(data, optimize=on), images.numpy()))
        for name, on in modes.items()
    }


def test_the_form_is_a_format_of_the_policy():
    policy = Policy(
        default=Policy.uniform(16).default,
        layers=[LayerPolicy(name="a", activation=activation_spec(8)), LayerPolicy(name="b")],
    )
    exact = take_form(policy, "exact")
    assert "activation: uint16/tensor" in exact.to_yaml()
    assert Policy.from_yaml(exact.to_yaml()) == exact
    choices = exact.resolve(["a", "b"])
    assert [c.asked for c in choices.values()] == ["W16A8", "W16A16 exact"]
    assert [c.exact for c in choices.values()] == [False, True]
    assert take_form(exact, "fast") == policy
    assert policy.resolve(["a", "b"])["b"].asked == "W16A16"
    floats = policy.replace(layers=[LayerPolicy(name="*", activation="float")])
    assert take_form(floats, "exact").resolve(["a"])["a"].activation is None


def test_other_16_bit_activations_are_refused():
    policy = Policy.from_yaml("version: 1\ndefault: {activation: uint16/channel}\n")
    with pytest.raises(PolicyError, match=r"must be int16/tensor at 16 bits, or uint16/tensor\. G"):
        policy.resolve(["a"])
    group = Policy(groups=[["a", "b"]], layers=[LayerPolicy(name="a", activation=ROUNDED_16)])
    with pytest.raises(PolicyError, match=r"a group read one tensor.*a: uint16/tensor, b: uint8"):
        group.resolve(["a", "b"])


def test_sixteen_bits_stand_where_only_such_layers_read():
    residual = to_float(nets.build("residual"), nets.images())
    assert list(residual.layers) == ["conv1", "conv2", "conv3", "head.2"]
    every = prepare(residual, EXACT)
    assert set(bits(every).values()) == {16}
    assert len(bits(every)) == 4
    # What an integer convolution writes is uint8; what an integer one reads as well.
    inner = bits(mixed("residual", {"conv2": "exact"}))
    assert set(inner.values()) == {8}
    first = bits(mixed("residual", {"conv1": "exact"}))
    assert (first["x"], first["relu_1"]) == (16, 8)
    # The addition of a float to a tensor of 16 bits stays in float, and so does its precision.
    tail = mixed("residual", {"conv2": "exact", "conv3": "exact", "head.2": "exact"})
    assert bits(tail)["relu_1"] == 16
    assert not any("add" in node for node in bits(tail))
    assert bits(mixed("residual", {"conv2": "fast"})).keys() <= inner.keys()


def test_plans_say_what_became_of_it():
    plans = mixed("residual", {"conv2": "exact", "head.2": "exact"}).plans
    assert plans["conv2"].site is None
    assert "its input is rounded to 16 bits when it runs" in plans["head.2"].notes
    assert "reads a tensor that another layer needs at 8 bits" in plans["conv2"].notes


@pytest.mark.parametrize("net", NETS)
def test_the_runtime_keeps_every_rounding(net: str, tmp_path: Path):
    graph, images = quantized(nets.build(net)), nets.images(24, seed=3)
    frozen = freeze(graph)
    with torch.no_grad():
        want = frozen.module(images)
        assert torch.equal(want, graph.module(images))
    result = to_onnx(graph, tmp_path / "m.onnx", images=images)
    data = result.path.read_bytes()
    onnx.checker.check_model(str(result.path), full_check=True)
    for model in (onnx.load_from_string(data), runtime.optimized_model(data)):
        assert len(roundings(model)) == len(graph.sites) > 2
    rows = result.certificate.layers
    assert {r.asked for r in rows} == {"W16A16 exact"}
    assert {r.stored for r in rows} == {"INT16"}
    assert not any(r.integer or r.broken for r in rows)
    assert all(r.reason.endswith("its input is rounded to 16 bits when it runs") for r in rows)
    assert result.certificate.needs == "onnxruntime>=1.18"
    assert result.verification is not None
    assert result.verification.max_own_step <= 1
    assert len(result.verification.layers) == len(graph.sites)
    for answer in answers(data, images).values():
        assert sqnr_db(want, answer) > MIN_SQNR_DB


def test_it_rounds_where_the_fast_form_does_not(tmp_path: Path):
    net, images = nets.build("plain"), nets.images(24, seed=3)
    fast, exact = (
        to_onnx(quantized(net, policy), tmp_path / "m.onnx").path.read_bytes()
        for policy in (Policy.uniform(16), EXACT)
    )
    assert not roundings(onnx.load_from_string(fast))
    a, b = (answers(data, images)["default"] for data in (fast, exact))
    assert 60 < sqnr_db(a, b) < 120


def large_biases(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.linspace(-40, 40, module.out_channels))
    return net


@pytest.mark.parametrize("biases", [False, True])
def test_both_traps_of_the_runtime_are_closed(biases: bool, tmp_path: Path, monkeypatch):
    """Weights that the runtime would quantize to 8 bits, biases that overflow its 32."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    graph, images = quantized(large_biases(net) if biases else net), nets.images(24, seed=3)
    with torch.no_grad():
        want = freeze(graph).module(images)
    data = to_onnx(graph, tmp_path / "m.onnx").path.read_bytes()
    for answer in answers(data, images).values():
        assert sqnr_db(want, answer) > MIN_SQNR_DB
    steps = tuple(step for step in place.STEPS if step is not place.guard)
    monkeypatch.setattr(place, "STEPS", steps)
    with pytest.raises(ExportError, match=r"0: asked for W16A16 exact, but the runtime"):
        to_onnx(graph, tmp_path / "open.onnx")
    trapped = to_onnx(graph, tmp_path / "open.onnx", allow_float_fallback=True).path.read_bytes()
    assert sqnr_db(want, answers(trapped, images)["default"]) < 80


def test_a_rounding_that_is_missing_breaks_the_promise(tmp_path: Path):
    graph = quantized(nets.build("plain"))
    path = to_onnx(graph, tmp_path / "m.onnx").path
    assert not certify(path).broken()
    model = onnx.load(path)
    graph_of = model.graph
    first = next(n for n in graph_of.node if n.op_type == "QuantizeLinear")
    decode = next(n for n in graph_of.node if first.output[0] in n.input)
    for node in graph_of.node:
        node.input[:] = [first.input[0] if i == decode.output[0] else i for i in node.input]
    graph_of.node.remove(decode)
    graph_of.node.remove(first)
    onnx.save(model, path)
    (row,) = certify(path).broken()
    assert row.name == "features.0"
    assert "asked for W16A16 exact, but the runtime rounds its input nowhere" in row.reason


def test_beside_integer_layers_the_certificate_tells_the_grid(tmp_path: Path):
    graph = mixed("residual", {"conv2": "exact", "head.2": "exact"})
    calibrate(graph, nets.images(16), method="minmax")
    images = nets.images(24, seed=3)
    path = to_onnx(graph, tmp_path / "m.onnx", images=images).path
    rows = {row.name: row for row in certify(path, graph).layers}
    assert rows["conv1"].executed == rows["conv3"].executed == "QLinearConv"
    assert rows["conv2"].reason.endswith("its input is rounded to 8 bits when it runs")
    assert rows["head.2"].reason.endswith("its input is rounded to 16 bits when it runs")
    assert not any(row.broken for row in rows.values())


def test_narrow_weights_with_16_bit_activations_in_old_forms(tmp_path: Path):
    policy = Policy(default=EXACT.default, layers=[LayerPolicy(name="*", weight=weight_spec(4))])
    graph, images = quantized(nets.build("residual"), policy), nets.images(24, seed=3)
    path = tmp_path / "m.onnx"
    result = to_onnx(graph, path, images=images, min_runtime="1.18")
    assert (result.certificate.opset, result.certificate.needs) == (21, "onnxruntime>=1.18")
    assert {row.stored for row in result.certificate.layers} == {"UINT8"}
    assert {row.asked for row in result.certificate.layers} == {"W4A16 exact"}
    assert len(verify_file(graph, path, images).layers) == len(graph.sites)


def test_an_untraceable_module_rounds_its_own_input(tmp_path: Path):
    graph = quantized(nets.build("island"))
    inside = [n for n, plan in graph.plans.items() if any("cannot be" in t for t in plan.notes)]
    assert inside
    for name in inside:
        island = graph.module.get_submodule(name)
        assert isinstance(island.input, FakeQuant)
        assert island.input.spec == ROUNDED_16
        assert island.layer.source is None
        assert isinstance(island.output, nn.Identity)


def test_training_learns_the_wide_steps():
    graph = quantized(nets.build("residual"))
    graph.module.train()
    graph.module(nets.images(8)).square().mean().backward()
    quantizers = [m for m in graph.module.modules() if isinstance(m, FakeQuant)]
    assert quantizers
    assert all(q.scale.grad is not None and bool(q.scale.grad.isfinite()) for q in quantizers)


def test_raw_images_keep_their_sixteen_bits(tmp_path: Path):
    from mpq.data import Normalization
    from mpq.export.pixels import PixelInput

    how = PixelInput(Normalization.parse("imagenet"))
    raw = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), np.uint8)
    images = torch.from_numpy(how.normalize.apply(raw))
    graph = prepare(nets.build("plain"), EXACT, images[:2])
    calibrate(graph, images[:16], method="minmax")
    result = to_onnx(graph, tmp_path / "m.onnx", images=images, pixels=how)
    assert result.verification is not None
    assert result.verification.max_own_step <= 1
