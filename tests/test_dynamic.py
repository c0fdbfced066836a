"""Linear layers whose input range is taken at run time, from the policy to a real onnxruntime."""

from __future__ import annotations

import nets
import onnx
import pytest
import torch
from torch import Tensor, nn

from mpq.errors import PolicyError
from mpq.export import runtime, to_onnx
from mpq.export.exact import verify_exact
from mpq.graph.annotate import make_dynamic
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.numerics import sqnr_db
from mpq.policy import DefaultSpec, LayerPolicy, Policy
from mpq.ptq import quantize_graph
from mpq.quant import ops
from mpq.quant.layer import QuantLayer
from mpq.spec import DYNAMIC, QuantSpec, weight_spec

KERNELS = {"DynamicQuantizeMatMul", "MatMulIntegerToFloat"}


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nets.build("attention")


def dynamic(net: nn.Module, bits: int = 8) -> tuple[QuantGraph, Policy]:
    """A network after training-free quantization, its linear layers dynamic."""
    floats = to_float(net, nets.images(4))
    linears = [n for n, info in floats.layers.items() if info.kind == "linear"]
    narrow = [LayerPolicy(name=n, weight=weight_spec(bits)) for n in linears]
    policy = make_dynamic(floats, Policy(layers=narrow))
    graph = prepare(floats, policy)
    quantize_graph(graph, nets.images(32), method="minmax")
    return graph, policy


def chosen(policy: Policy) -> set[str]:
    return {entry.name for entry in policy.layers if entry.activation == DYNAMIC}


def test_the_format_has_a_text_form_and_one_width():
    assert QuantSpec.parse("uint8/dynamic") == DYNAMIC
    assert str(DYNAMIC) == "uint8/dynamic"
    for text in ("int8/dynamic", "uint4/dynamic"):
        with pytest.raises(ValueError, match=rf"needs uint8/dynamic. Got {text} instead"):
            QuantSpec.parse(text)


def test_a_policy_that_names_it_is_read_and_written():
    policy = Policy(layers=[LayerPolicy(name="a", activation=DYNAMIC)])
    text = policy.to_yaml()
    assert "activation: uint8/dynamic" in text
    choice = Policy.from_yaml(text).resolve(["a", "b"])
    assert (choice["a"].dynamic, choice["b"].dynamic) == (True, False)
    assert choice["a"].activation_bits == 8


def test_weights_cannot_be_dynamic():
    policy = Policy(default=DefaultSpec(weight=DYNAMIC))
    with pytest.raises(PolicyError, match="weight of layer a must be signed"):
        policy.resolve(["a"])


def test_only_linear_layers_can():
    policy = Policy(layers=[LayerPolicy(name="patch", activation=DYNAMIC)])
    with pytest.raises(PolicyError, match=r"patch must be uint8/tensor: only linear layers"):
        prepare(vit(), policy, nets.images(2))


def test_layers_behind_float_operations_are_chosen_and_no_others():
    graph, policy = dynamic(vit())
    assert chosen(policy) == {n for n, i in graph.layers.items() if i.kind == "linear"}
    assert [site.readers for site in graph.sites.values()] == [("patch",), ()]
    residual = to_float(nets.build("residual"), nets.images(2))
    assert not chosen(make_dynamic(residual, Policy()))  # its classifier reads pooled integers


def test_wide_weights_stay_in_float(tmp_path):
    """There is no 16-bit integer kernel, whatever the activations are."""
    wide = LayerPolicy(name="up", weight=weight_spec(16), activation=DYNAMIC)
    policy = Policy(layers=[wide])
    graph = prepare(vit(), policy, nets.images(2))
    quantize_graph(graph, nets.images(16), method="minmax")
    made = to_onnx(graph, tmp_path / "m.onnx", images=nets.images(16))
    row = next(r for r in made.certificate.layers if r.name == "up")
    assert (row.executed, row.integer, row.broken) == ("MatMul", False, False)


def test_layers_that_share_a_tensor_need_not_agree():
    policy = Policy(groups=[["a", "b"]], layers=[LayerPolicy(name="a", activation=DYNAMIC)])
    assert policy.resolve(["a", "b"])["a"].dynamic


def test_the_operator_is_onnx_s():
    """Against ONNX's own definition of DynamicQuantizeLinear, and the sum written out."""
    draw = torch.Generator().manual_seed(0)
    for x in (torch.randn(3, 5, 7, generator=draw) + 1, torch.rand(4, 7, generator=draw) + 2):
        w = torch.randint(-127, 128, (6, 7), dtype=torch.int8, generator=draw)
        scale, bias = torch.rand(6, generator=draw), torch.randn(6, generator=draw)
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        step = torch.tensor((high - low) / 255)
        zero = (-torch.tensor(low) / step).round().clamp(0, 255)
        q = (x / step).round().add(zero).clamp(0, 255) - zero
        wanted = (q @ w.float().T) * (step * scale) + bias
        assert torch.allclose(ops.dynamic_linear(x, w, scale, bias), wanted, rtol=1e-5, atol=1e-5)
    none = ops.dynamic_linear(torch.zeros(2, 7), w, scale, bias)
    assert torch.equal(none, bias.expand(2, 6))


@pytest.mark.parametrize("bits", [8, 4])
def test_frozen_is_prepared_to_the_bit(bits: int):
    graph, _ = dynamic(vit(), bits)
    images = nets.images(16, seed=2)
    assert torch.equal(graph.module(images), freeze(graph).module(images))


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_runtime_multiplies_integers_and_answers_as_promised(bits: int, tmp_path):
    graph, policy = dynamic(vit(), bits)
    images = nets.images(48, seed=3)
    made = to_onnx(graph, tmp_path / "vit.onnx", images=images)
    onnx.checker.check_model(str(made.path), full_check=True)
    rows = {row.name: row for row in made.certificate.layers}
    for name in chosen(policy):
        assert rows[name].executed in KERNELS
        assert rows[name].asked == f"W{bits}A8 dynamic"
        assert not rows[name].broken
    told = made.certificate
    assert all(layer.integer for layer in told.layers)
    inside, between = (sum(p.macs for p in parts) for parts in (told.layers, told.besides))
    assert between == 2 * 4096  # queries with keys, and weights with values
    assert told.integer_macs_fraction == inside / (inside + between)
    assert "MatMulInteger" not in made.certificate.operators
    assert "DynamicQuantizeMatMul" in made.certificate.operators
    report = made.verification
    assert report is not None
    assert report.top1_agreement == 1
    assert report.logits_sqnr_db > 40
    floats = to_float(vit(), images[:2]).module(images).detach()
    answers = torch.from_numpy(runtime.run(runtime.session(made.path), images.numpy(), batch=48))
    assert sqnr_db(floats, answers) > {8: 30, 4: 12, 3: 6}[bits]


@pytest.mark.parametrize("options", [{"int4_format": "dq"}, {"min_runtime": "1.18"}])
def test_other_storage_forms_run_as_integers_too(options: dict[str, str], tmp_path):
    graph, policy = dynamic(vit(), 4)
    images = nets.images(16, seed=3)
    made = to_onnx(graph, tmp_path / "vit.onnx", images=images, **options)
    assert {r.executed for r in made.certificate.layers if r.name in chosen(policy)} <= KERNELS


class Twice(nn.Module):
    """Two linear layers read one tensor: it is quantized once."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.left, self.right = nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.fc = nn.Linear(16, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        return self.fc((self.left(x) * torch.tanh(self.right(x))).mean(1))


@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("attention", {"DynamicQuantizeMatMul"}),
        ("twice", {"DynamicQuantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}),
    ],
)
def test_its_integers_and_floats_are_predicted(name: str, kernels: set[str], tmp_path):
    torch.manual_seed(0)
    graph, _ = dynamic(vit() if name == "attention" else Twice().eval())
    path = to_onnx(graph, tmp_path / "net.onnx").path
    report = verify_exact(path, nets.images(8, seed=4).numpy())
    assert report.exact, report.differing()
    assert {node.op for node in report.nodes if node.mismatches is not None} >= kernels
    assert {node.reason for node in report.unpredicted()} == {"float"}


def test_a_static_product_with_float_output_is_predicted(tmp_path):
    graph = prepare(vit(), Policy(), nets.images(2))
    quantize_graph(graph, nets.images(32), method="minmax")
    path = to_onnx(graph, tmp_path / "net.onnx").path
    report = verify_exact(path, nets.images(8, seed=4).numpy())
    assert report.exact, report.differing()
    assert "MatMulIntegerToFloat" in {n.op for n in report.nodes if n.mismatches is not None}


def test_training_moves_its_weights():
    graph, _ = dynamic(vit())
    layer = graph.module.get_submodule("down")
    assert isinstance(layer, QuantLayer)
    assert "dynamic integer" in repr(layer)
    graph.module.train()
    x = nets.images(8).requires_grad_()
    loss: Tensor = graph.module(x).square().mean()
    loss.backward()
    assert layer.weight.grad is not None
    assert float(layer.weight.grad.abs().sum()) > 0
    assert x.grad is not None
    assert float(x.grad.abs().sum()) > 0
