from __future__ import annotations

import copy
import functools

import nets
import pytest
import torch
import torch.nn.functional as F
from nets import NETS, build, calibrate, images
from torch import Tensor, fx, nn

from mpq.errors import GraphError, PolicyError
from mpq.graph.annotate import reading_groups
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import TO_FLOAT, freeze, outputs, prepare, run, to_float
from mpq.graph.trace import trace
from mpq.layers import LayerInfo
from mpq.policy import LayerPolicy, Policy
from mpq.quant.fake_quant import FakeQuant, FrozenQuant
from mpq.quant.layer import FrozenLayer, IslandLayer, QuantLayer
from mpq.spec import QuantSpec, activation_spec, weight_spec

FORMATS = ("w8a8", "w4a8", "w16a16", "w4a4", "w8a8_tensor", "mixed", "some_float", "all_float")


def policy_for(kind: str, names: list[str]) -> Policy:
    """A policy that touches every layer of a network; activation and weight widths cycle."""
    if kind.startswith("w") and kind != "w8a8_tensor":
        weight, act = kind[1:].split("a")
        return Policy.uniform(int(weight), int(act))
    if kind == "w8a8_tensor":
        return Policy.model_validate({"default": {"weight": "int8/tensor"}})
    cycles = {
        "mixed": [(8, 8), (4, 8), (16, 16), (4, 4), (8, 4)],
        "some_float": [(8, 8), (None, None), (4, None), (None, 8)],
        "all_float": [(None, None)],
    }
    layers = []
    for i, name in enumerate(names):
        weight, act = cycles[kind][i % len(cycles[kind])]
        spec = weight_spec(weight) if weight else "float"
        layers.append(
            LayerPolicy(name=name, weight=spec, activation=activation_spec(act) if act else "float")
        )
    return Policy(layers=layers)


@functools.cache
def float_graph(name: str) -> QuantGraph:
    """Traced and folded once for all tests; `prepare` works on a copy."""
    return to_float(build(name), images())


def prepared(name: str, kind: str = "w8a8") -> QuantGraph:
    qg = float_graph(name)
    return calibrate(prepare(qg, policy_for(kind, list(qg.layers))), images(4, seed=1))


class Small(nn.Module):
    """A network from a function of its modules, for one-off graphs."""

    def __init__(self, forward, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


# -- the promise: what training sees is what is exported ------------------------------------


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_frozen_equals_prepared_bit_for_bit(name: str):
    for kind in FORMATS:
        check_frozen(prepared(name, kind), images(3, seed=2), kind)


def check_frozen(graph: QuantGraph, x: Tensor, kind: str) -> None:
    out = graph.module(x)
    frozen = freeze(graph)
    torch.testing.assert_close(frozen.module(x), out, atol=0, rtol=0, msg=kind)
    assert frozen.stage == "frozen"
    assert graph.stage == "prepared"  # freezing works on a copy
    assert torch.equal(graph.module(x), out)
    kinds = {type(m) for m in frozen.module.modules()}
    assert not kinds & {FakeQuant, QuantLayer}
    assert not any(p.requires_grad for p in frozen.module.parameters())


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_eight_bits_are_near_the_float_network(name: str):
    x = images(4, seed=1)
    exact, found = build(name)(x), prepared(name).module(x)
    assert float((found - exact).abs().max()) < 0.05 * float(exact.abs().max())
    assert not torch.equal(found, exact)


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_all_float_changes_nothing(name: str):
    graph = prepared(name, "all_float")
    assert graph.sites == {}
    assert torch.equal(graph.module(images()), to_float(build(name), images()).module(images()))


@pytest.mark.parametrize("name", NETS)
def test_training_reaches_every_parameter(name: str):
    graph = prepared(name, "w4a8")
    graph.module.train()
    graph.module(images(4, seed=3)).square().sum().backward()
    for key, parameter in graph.module.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
    # The island's own quantizers stand behind equal ones: their values are integers already, and
    # the derivatives of their steps are zero.
    behind = {"gate.conv.input.scale", "gate.mix.input.scale"}
    named = graph.module.named_parameters()
    steps = [p for n, p in named if n.endswith(".scale") and n not in behind]
    assert sum(bool(p.grad.ne(0).any()) for p in steps) == len(steps)


@torch.no_grad()
def test_trained_weights_load_into_a_fresh_graph():
    graph = prepared("residual", "mixed")
    fresh = to_float(build("residual", seed=9), images())
    other = prepare(fresh, policy_for("mixed", list(fresh.layers)))
    other.module.load_state_dict(graph.module.state_dict())
    assert torch.equal(other.module(images()), graph.module(images()))


def test_the_state_holds_the_parameters_once():
    names = set(prepared("functional").module.state_dict())
    layers = ("weight1_1", "weight2_1", "weight3_1")
    sites = ("x", "relu", "relu_1", "avg_pool2d")
    expected = {f"{name}.{part}" for name in layers for part in ("weight", "scale")}
    expected |= {"weight1_1.bias", "weight3_1.bias"}
    expected |= {f"quantizers.{s}.{part}" for s in sites for part in ("scale", "zero_point")}
    assert names == expected


# -- float graphs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_to_float_keeps_the_function_and_the_model(name: str):
    model, x = build(name).train(), images()
    state = copy.deepcopy(model.state_dict())
    graph = to_float(model, x)
    assert model.training  # the user's own object is as it was
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in graph.module.parameters()}
    torch.testing.assert_close(graph.module(x), model.eval()(x), atol=1e-4, rtol=1e-4)


def test_to_float_draws_no_random_number():
    before = torch.random.get_rng_state()
    for name in ("functional", "shared", "global_mean"):
        model = build(name)
        to_float(model, images())
    assert torch.equal(torch.random.get_rng_state(), before)


LAYER_NAMES = {
    "plain": ["features.0", "features.4", "head.2"],
    "residual": ["conv1", "conv2", "conv3", "head.2"],
    "depthwise": ["stem.0", "expand.0", "depthwise.0", "project.0", "head.2"],
    "shared": ["conv", "conv_2_1", "conv_2", "head.2"],
    "functional": ["weight1_1", "weight2_1", "weight3_1"],
    "island": ["stem.0", "gate.conv", "gate.up", "gate.mix", "head.2"],
    "transposed": ["down.0", "up1", "up2", "out", "head.2"],
}


@pytest.mark.parametrize(("name", "layers"), LAYER_NAMES.items())
def test_module_paths_survive_in_execution_order(name: str, layers: list[str]):
    assert list(to_float(build(name), images()).layers) == layers


def test_layer_facts():
    found = to_float(build("depthwise"), images()).layers
    assert found["depthwise.0"] == LayerInfo(
        name="depthwise.0",
        kind="depthwise",
        weight_shape=(16, 1, 3, 3),
        out_channels=16,
        bias=True,  # of the batch norm
        macs=16 * 9 * 144,
        in_elements=16 * 144,
        out_elements=16 * 144,
        grouped=True,
    )
    assert found["head.2"].macs == 40
    assert found["head.2"].kind == "linear"
    assert found["stem.0"].params == 216
    assert found["stem.0"].weight_bytes(4) == 108
    assert found["stem.0"].weight_bytes(None) == 864
    assert found["head.2"].bitops(4, None) == 40 * 4 * 32
    up = to_float(build("transposed"), images()).layers
    assert up["up1"].kind == "conv_transpose"
    assert up["up1"].macs == 8 * 8 * 4 * 36
    assert up["up2"].macs == 8 * 4 * 9 * 144


def norms(graph: QuantGraph) -> list[str]:
    kinds = nn.modules.batchnorm._BatchNorm
    return [n for n, m in graph.module.named_modules() if isinstance(m, kinds)]


@pytest.mark.parametrize("name", NETS)
def test_batch_norms_are_folded(name: str):
    graph = to_float(build(name), images())
    assert norms(graph) == []
    assert not any("running" in key for key in graph.module.state_dict())


def test_a_norm_that_cannot_be_folded_becomes_a_depthwise_convolution():
    model = build("pre_activation")
    graph = to_float(model, images())
    # bn2 is folded: it stands behind a layer that nobody else reads.
    assert [n for n, info in graph.layers.items() if info.kind == "depthwise"] == ["bn1", "bn3"]
    with torch.no_grad():
        torch.testing.assert_close(graph.module(images()), model(images()), atol=1e-5, rtol=1e-5)
    for bits in (2, 8):  # one weight and one scale per channel: exact at any width
        layer = prepare(graph, Policy.uniform(bits, 8)).module.get_submodule("bn1")
        values = layer.integers() * layer.step().reshape(-1, 1, 1, 1)
        torch.testing.assert_close(values, layer.weight, rtol=1e-6, atol=0)


def test_norms_that_cannot_be_folded_stay():
    no_statistics = nn.BatchNorm2d(4, track_running_stats=False)
    graph = to_float(nn.Sequential(nn.Conv2d(3, 4, 3), no_statistics), images())
    assert norms(graph) == ["1"]
    # Behind a Linear on [N, C, L] the norm belongs to dimension 1, not to the layer's output.
    model = nn.Sequential(nn.Flatten(1, 2), nn.Linear(12, 36), nn.BatchNorm1d(36)).eval()
    nn.init.normal_(model[2].running_mean, generator=torch.Generator().manual_seed(0))
    graph = to_float(model, images())
    assert norms(graph) == ["2"]
    torch.testing.assert_close(graph.module(images()), model(images()))


def test_a_network_that_needs_a_batch_is_refused():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(flat, nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 2))
    with pytest.raises(GraphError, match=r"answer to one sample .* track_running_stats=True"):
        to_float(model.eval(), images())


def test_a_norm_behind_a_matrix_product_is_folded():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 6), nn.BatchNorm1d(6)).eval()
    nn.init.normal_(model[2].running_mean, generator=torch.Generator().manual_seed(0))
    graph = to_float(model, images())
    assert norms(graph) == []
    torch.testing.assert_close(graph.module(images()), model(images()), atol=1e-5, rtol=1e-5)


def test_a_norm_without_affine_parameters_is_folded():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).eval()
    nn.init.uniform_(model[1].running_var, 0.5, 2, generator=torch.Generator().manual_seed(0))
    graph = to_float(model, images())
    assert norms(graph) == []
    torch.testing.assert_close(graph.module(images()), model(images()), atol=1e-4, rtol=1e-4)


def test_shared_calls_become_modules_of_their_own_on_one_parameter():
    module = to_float(build("shared"), images()).module
    assert module.conv is not module.conv_2_1
    assert module.conv.weight is module.conv_2_1.weight
    assert module.conv_2.weight.shape[0] == 8


def test_a_shared_layer_takes_two_different_norms():
    conv, one, two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    nn.init.constant_(two.running_mean, 0.7)
    model = Small(lambda m, x: m.two(m.conv(m.one(m.conv(x)))), conv=conv, one=one, two=two).eval()
    graph = to_float(model, images())
    assert norms(graph) == []
    torch.testing.assert_close(graph.module(images()), model(images()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "mean",
    [
        lambda x: x.mean([2, 3]),
        lambda x: x.mean((-1, -2)),
        lambda x: torch.mean(x, dim=(2, 3)),
        lambda x: x.mean((2, 3), keepdim=True).flatten(1),
        lambda x: F.adaptive_avg_pool2d(x, (1, 1)).view(x.shape[0], -1),
    ],
)
def test_global_means_become_pooling(mean):
    model = Small(lambda m, x: m.fc(mean(m.conv(x))), conv=nn.Conv2d(3, 8, 3), fc=nn.Linear(8, 5))
    graph = to_float(model.eval(), images())
    assert any(type(m) is nn.AdaptiveAvgPool2d for m in graph.module.modules())
    torch.testing.assert_close(graph.module(images()), model(images()), atol=1e-6, rtol=1e-5)


def test_other_means_stay():
    conv = nn.Conv2d(3, 8, 3)
    for mean in (lambda x: x.mean(1), lambda x: x.flatten(2).mean((-1, -2)), lambda x: x.mean()):
        graph = to_float(Small(lambda m, x, f=mean: f(m.conv(x)), conv=conv), images())
        assert not any(type(m) is nn.AdaptiveAvgPool2d for m in graph.module.modules())
        torch.testing.assert_close(graph.module(images()), mean(conv(images())))
    # Dimensions 2 and 3 of five are not height and width.
    model = Small(lambda m, x: m.conv(x.unsqueeze(2)).mean((2, 3)), conv=nn.Conv3d(3, 4, 1))
    graph = to_float(model, images())
    torch.testing.assert_close(graph.module(images()), model(images()))


def test_dropout_goes_even_where_it_would_act():
    model = Small(lambda m, x: F.dropout(m.drop(m.conv(x))), conv=nn.Conv2d(3, 4, 3),
                  drop=nn.Dropout2d())  # fmt: skip
    graph = to_float(model, images())
    assert [n.op for n in graph.module.graph.nodes] == ["placeholder", "call_module", "output"]


def test_an_encoder_of_torch_is_layers_like_others():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return m.fc(m.encoder(m.conv(x).flatten(2).transpose(1, 2)).mean(1))

    model = Small(forward, conv=nn.Conv2d(3, 8, 4, 4), encoder=encoder, fc=nn.Linear(8, 5)).eval()
    graph = prepare(model, Policy.uniform(8), images())
    own = ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    assert list(graph.layers) == ["conv", *(f"encoder.{name}" for name in own), "fc"]
    with torch.no_grad():
        assert calibrate(graph, images()).module(images()).shape == (2, 5)


# -- what cannot be traced ------------------------------------------------------------------


def test_an_untraceable_submodule_becomes_an_island():
    graph = prepared("island")
    assert list(graph.islands) == ["gate"]
    assert "nets.py" in graph.islands["gate"]
    assert "if x.mean() > 100" in graph.islands["gate"]
    gate = graph.module.gate
    assert isinstance(gate.conv, IslandLayer)
    assert isinstance(gate.conv.input, FakeQuant)
    assert isinstance(gate.conv.output, FakeQuant)
    assert isinstance(gate.mix.output, nn.Identity)
    assert isinstance(gate.up.input, FakeQuant)  # a transposed convolution runs as integers
    plan = graph.plans["gate.up"]
    assert plan.support.integer is True
    assert str(plan.support.stored) == "int8/channel"
    assert any("cannot be traced" in note for note in plan.notes)
    assert isinstance(freeze(graph).module.gate.conv.input, FrozenQuant)


def test_an_untraceable_root_names_file_line_and_remedy():
    model = nets.UntraceableRoot()
    message = r"UntraceableRoot.forward must be the same.*nets\.py:\d+: `if x\.sum\(\) > 0:"
    with pytest.raises(GraphError, match=message) as caught:
        to_float(model, images())
    assert "torch.where, or move it into a submodule" in str(caught.value)


def test_tracing_again_is_tracing():
    graph = fx.symbolic_trace(build("residual"))
    assert list(to_float(graph, images()).layers) == LAYER_NAMES["residual"]


def test_an_input_that_does_not_fit():
    with pytest.raises(GraphError, match=r"must run on an input of shape \[4, 12, 12\] but fails"):
        to_float(build("plain"), torch.zeros(1, 4, 12, 12))
    with pytest.raises(GraphError, match=r"must run on an input of shape \[4, 12, 12\] but fails"):
        to_float(build("global_mean"), torch.zeros(1, 4, 12, 12))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_refused(kind: torch.dtype):
    message = (
        rf"weights of Plain must be float32. Got features.0.weight as {str(kind)[6:]}.*float\(\)"
    )
    with pytest.raises(GraphError, match=message):
        to_float(build("plain").to(kind), images().to(kind))


def test_a_model_without_layers():
    with pytest.raises(GraphError, match="no Conv or Linear layer"):
        to_float(nn.Sequential(nn.ReLU(), nn.Flatten()), images())


# -- quantizer placement --------------------------------------------------------------------

SITES = {
    "plain": ["x", "features_2", "features_6", "head_0"],
    "residual": ["x", "relu", "relu_1", "conv3", "relu_2", "head_0"],
    "depthwise": ["x", "stem_2", "expand_2", "depthwise_2", "project_0", "add", "head_0"],
    "concat": ["x", "relu", "relu_1", "cat", "relu_2", "head_0"],
    "se_sigmoid": ["x", "stem_2", "pool", "relu", "up", "gate", "mul", "relu_1", "head_0"],
    "se_hardsigmoid": ["x", "stem_2", "pool", "relu", "up", "gate", "mul", "relu_1", "head_0"],
    "shared": ["x", "relu", "relu_1", "relu_2", "head_0"],
    "functional": ["x", "relu", "relu_1", "avg_pool2d"],
    "global_mean": ["x", "relu", "mean_pool"],
    "island": ["x", "stem_2", "head_0"],
    "pre_activation": ["x", "stem", "relu", "relu_1", "conv2", "add", "relu_2", "head_0"],
    "gated": ["x", "stem_0", "sigmoid", "mul", "conv", "hardsigmoid", "mul_1", "head_0"],
    "attention": ["x", "patch", "norm1", "matmul_1", "norm2", "gelu", "norm3"],
    "one_dimension": ["x", "relu", "relu_1"],
    "transposed": ["x", "down_2", "relu", "relu_1", "relu_2", "head_0"],
    "shuffle": ["x", "relu", "relu_1", "cat", "relu_2", "head_0"],
}


@pytest.mark.parametrize("name", NETS)
def test_quantizers_stand_where_integers_begin(name: str):
    graph = prepared(name)
    assert [site.node for site in graph.sites.values()] == SITES[name]
    assert graph.sites["quantizers.x"].role == "input"
    for path, plan in graph.plans.items():
        if path == "up2":
            assert plan.site is None
            assert "a transposed convolution in groups has no integer form" in plan.notes[-1]
        elif not path.startswith("gate."):
            assert path in graph.sites[str(plan.site)].readers
            layer = graph.module.get_submodule(path)
            assert layer.source is graph.module.get_submodule(str(plan.site))


@pytest.mark.parametrize("name", NETS)
def test_sixteen_bits_need_no_quantizer(name: str):
    graph = prepared(name, "w16a16")
    assert graph.sites == {}
    assert all(str(plan.support.stored) == "int16/channel" for plan in graph.plans.values())
    assert all("no 16-bit integer kernel" in plan.notes[-1] for plan in graph.plans.values())


def test_relu6_is_absorbed_with_its_ceiling():
    graph = prepared("depthwise")
    ceilings = {s.node: s.ceiling for s in graph.sites.values() if s.ceiling}
    assert ceilings == {"stem_2": 6.0, "expand_2": 6.0, "depthwise_2": 6.0}
    assert not any(isinstance(m, nn.ReLU6) for m in graph.module.modules())


@torch.no_grad()
def test_relu6_saturates_in_calibration_and_in_eval():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.constant_(conv.weight, 10)
    model = nn.Sequential(conv, nn.ReLU6(), nn.Conv2d(3, 4, 1)).eval()
    graph = prepare(model, Policy.uniform(8), images())
    for part in graph.module.modules():
        if isinstance(part, (FakeQuant, QuantLayer)):
            part.enabled = False
    torch.testing.assert_close(graph.module(images()), model(images()))
    graph = calibrate(prepare(model, Policy.uniform(8), images()), images())
    assert float(outputs(graph, ["quantizers._1"], images())["quantizers._1"].max()) == (
        pytest.approx(6.0)
    )


def test_the_function_relu6_is_absorbed_too():
    model = Small(lambda m, x: m.b(F.relu6(m.a(x), inplace=True)), a=nn.Conv2d(3, 4, 1),
                  b=nn.Conv2d(4, 4, 1))  # fmt: skip
    graph = prepare(model, Policy.uniform(8), images())
    assert graph.sites["quantizers.relu6"].ceiling == 6.0
    assert any(n.target is F.relu for n in graph.module.graph.nodes)


def test_a_convolution_that_ends_the_network_writes_integers():
    """Its kernel writes nothing else, also behind a view of its shape; a matrix product may."""
    parts = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 5, 10)}
    for forward in (
        lambda m, x: m.b(F.relu(m.a(x))),
        lambda m, x: (lambda y: y.view(y.size(0), -1))(m.b(F.relu(m.a(x)))),
        lambda m, x: (lambda y: y.reshape(y.shape[0], -1))(m.b(F.relu(m.a(x)))),
    ):
        graph = prepare(Small(forward, **parts), Policy.uniform(8), images())
        assert list(graph.sites) == ["quantizers.x", "quantizers.relu", "quantizers.b"]


def test_a_float_layer_keeps_its_neighbours_in_float():
    policy = Policy(layers=[LayerPolicy(name="conv2", weight="float", activation="float")])
    graph = prepare(build("residual"), policy, images())
    assert type(graph.module.conv2) is nn.Conv2d
    assert "quantizers.relu_1" in graph.sites  # conv3 reads it
    assert graph.plans["conv2"].notes == ("kept in float by the policy",)


def test_a_tensor_with_readers_of_two_widths_takes_the_wider():
    parts = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(3, 4, 1)}
    model = Small(lambda m, x: m.a(x) + m.b(x), **parts)
    narrow = [LayerPolicy(name="b", activation=activation_spec(4))]
    graph = prepare(model, Policy(target="onnxruntime-cpu", layers=narrow), images())
    assert str(graph.sites["quantizers.x"].spec) == "uint8/tensor"
    assert graph.plans["b"].notes == ("reads a tensor that another layer needs at 8 bits",)
    assert graph.plans["a"].notes == ()


def test_narrow_activations_reach_the_quantizer():
    graph = prepared("plain", "w4a4")
    # What no layer reads (here pooling does) has no policy of its own and keeps 8 bits.
    formats = {bool(s.readers): str(s.spec) for s in graph.sites.values()}
    assert formats == {True: "uint4/tensor", False: "uint8/tensor"}
    with torch.no_grad():
        values = outputs(graph, ["quantizers.features_2"], images())["quantizers.features_2"]
    assert len(values.unique()) <= 16


@torch.no_grad()
def test_outputs_of_named_modules_lie_on_their_grid():
    graph = prepared("plain")
    found = outputs(graph, list(graph.sites), images())
    assert list(found) == list(graph.sites)
    for name, values in found.items():
        q = values / graph.module.get_submodule(name).step()
        assert torch.allclose(q, q.round(), atol=1e-3)


def test_reading_groups():
    assert reading_groups(to_float(build("concat"), images())) == [["left", "right"]]
    assert reading_groups(to_float(build("plain"), images())) == []


# -- policy and stages ----------------------------------------------------------------------


def test_an_unknown_layer_is_refused_with_the_nearest_name():
    policy = Policy(layers=[LayerPolicy(name="features.8")])
    with pytest.raises(PolicyError, match=r"'features.8' must name a layer.*did you mean features"):
        prepare(build("plain"), policy, images())


def test_a_policy_is_bound_to_the_layers_not_to_the_modules():
    with pytest.raises(PolicyError, match="'dropout' must name a layer"):
        prepare(build("plain"), Policy(layers=[LayerPolicy(name="dropout")]), images())


def test_prepare_leaves_a_float_graph_alone():
    graph = to_float(build("plain"), images())
    before = graph.module(images())
    for kind in ("w8a8", "w4a8"):
        assert prepare(graph, policy_for(kind, list(graph.layers))).stage == "prepared"
    assert graph.stage == "float"
    assert graph.sites == {}
    assert torch.equal(graph.module(images()), before)


def test_every_stage_is_in_eval_mode():
    graph = to_float(build("functional").train(), images())
    parts = [graph, prepare(graph, Policy.uniform(8))]
    parts.append(freeze(calibrate(parts[-1], images())))
    for part in parts:
        assert not any(m.training for m in part.module.modules())


def test_passes_check_the_stage():
    graph = to_float(build("plain"), images())
    with pytest.raises(GraphError, match=r"need a graph in stage 'traced'. Got 'float'"):
        run(graph, TO_FLOAT, needs="traced", gives="float")
    with pytest.raises(GraphError, match=r"need a graph in stage 'prepared'. Got 'float'"):
        freeze(graph)
    with pytest.raises(GraphError, match="needs an example input batch"):
        prepare(build("plain"), Policy.uniform(8))


def test_a_failing_pass_is_named():
    def broken_pass(graph: QuantGraph) -> int:
        raise KeyError("lost")

    graph = trace(build("plain"), images())
    with pytest.raises(GraphError, match="pass broken_pass failed: 'lost'"):
        run(graph, (broken_pass,), needs="traced", gives="float")


@pytest.mark.parametrize("path", ["quantizers.x", "features.0"])
def test_freezing_wants_every_quantizer_switched_on(path: str):
    graph = prepared("plain")
    graph.module.get_submodule(path).enabled = False
    with pytest.raises(GraphError, match=f"{path} must be switched on before freezing"):
        freeze(graph)


def test_frozen_weights_are_integers_with_an_integer_bias():
    module = freeze(prepared("plain", "mixed")).module
    first, second, third = (module.get_submodule(n) for n in LAYER_NAMES["plain"])
    assert all(isinstance(m, FrozenLayer) for m in (first, second, third))
    assert (first.weight.dtype, first.bias.dtype) == (torch.int8, torch.int32)
    assert int(second.weight.max()) <= 7
    assert int(second.weight.min()) >= -8
    assert (third.weight.dtype, third.bias.dtype) == (torch.int16, torch.float32)
    assert third.spec == QuantSpec.parse("int16/channel")


@pytest.mark.parametrize("name", ["to", "half", "training"])
def test_a_node_may_be_called_as_a_part_of_a_module(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.other = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.other(F.elu(self.conv(x)))

    graph = to_float(Named().eval(), images())
    elu = next(n for n in graph.module.graph.nodes if n.target is F.elu)
    elu._rename(name)
    graph.module.recompile()
    prepared = prepare(graph, Policy.uniform(8))
    assert f"quantizers.{name}_site" in prepared.sites
    assert prepared.module(images()).isfinite().all()
