"""Files that a real onnxruntime loads, runs and is asked about."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import nets
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from nets import Head, build, conv_bn, images
from onnx import numpy_helper
from torch import Tensor, nn

from mpq import export
from mpq.errors import ExportError, PolicyError, UsageError
from mpq.export import ExportResult, float_to_onnx, runtime, to_onnx
from mpq.export.certify import certify
from mpq.export.lower import lower
from mpq.export.meta import KEY, from_metadata, to_metadata
from mpq.export.onnx_file import serialize
from mpq.export.peers import onnxruntime_dynamic, onnxruntime_static
from mpq.export.place import place
from mpq.export.verify import verify
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.policy import LayerPolicy, ModelInfo, Policy
from mpq.ptq import calibrate, quantize_layers
from mpq.spec import activation_spec, weight_spec


class OptionA(nn.Module):
    """A residual block whose shortcut subsamples and pads channels with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.conv1, self.bn1 = conv_bn(8, 16, stride=2)
        self.conv2, self.bn2 = conv_bn(16, 16)
        self.head = Head(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return self.head(F.relu(y + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))))


class Stem(nn.Module):
    """The stem of a ResNet, an average pooling, and a padding of its own before a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(3, 8, size=7, stride=2)
        self.pool, self.last = nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3)
        self.average, self.fc = nn.AvgPool2d(2), nn.Linear(8, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.pool(F.relu(self.bn(self.conv(x)))), (0, 1, 0, 1))
        return self.fc(self.average(F.relu(self.last(x))).flatten(1))


class Tokens(nn.Module):
    """Matrix products on sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.fc = nn.Linear(16, nets.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.fc(self.down(F.relu(self.up(x))).mean(1))


class ByShape(nn.Module):
    """Branches on a shape: fx cannot trace it, the exporter can."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.mix = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] < 4:
            return x
        return self.mix(F.relu(self.conv(x)) + self.point(x))


class Isle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, 8), nn.ReLU())
        self.isle, self.head = ByShape(), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.isle(self.stem(x)))


class Sandwich(nn.Module):
    """Three convolutions in a row; tests keep the middle one wide."""

    def __init__(self, bias: float = 0.0, pool: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle, self.last = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2) if pool else nn.Identity()
        self.head = Head(8)
        nn.init.uniform_(self.middle.bias, bias, bias + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.middle(F.relu(self.first(x)))))
        return self.head(F.relu(self.last(x)))


OWN = {"option_a": OptionA, "stem": Stem, "tokens": Tokens, "isle": Isle}
KINDS = [*(n for n in nets.NETS if n != "island"), *OWN]
CYCLE = ((16, 16), (8, 8), (4, 8), (8, 4))
DEEP = {"option_a", "depthwise", "residual", "isle"}
"""Networks where a difference of one step can become one of two further on."""


@torch.no_grad()
def model(name: str) -> nn.Module:
    """A network that answers with several classes: its last bias evens them out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = OWN[name]().eval() if name in OWN else build(name)
    last = [p for p in net.parameters() if p.shape == (nets.CLASSES,)][-1]
    last -= net(images(200, seed=9)).mean(0)
    return net


def policy_for(kind: str, names: list[str]) -> Policy:
    if kind != "mixed":
        weight, activation = kind[1:].split("a")
        return Policy.uniform(int(weight), int(activation))
    widths = [CYCLE[i % len(CYCLE)] for i in range(len(names))]
    return Policy(
        layers=[
            LayerPolicy(name=n, weight=weight_spec(w), activation=activation_spec(a))
            for n, (w, a) in zip(names, widths, strict=True)
        ]
    )


def quantized(net: nn.Module, kind: str | Policy) -> tuple[QuantGraph, Policy]:
    """A frozen graph with calibrated ranges, and its policy."""
    qg = to_float(net, images())
    policy = kind if isinstance(kind, Policy) else policy_for(kind, list(qg.layers))
    prepared = prepare(qg, policy)
    calibrate(prepared, images(32), method="minmax")
    quantize_layers(prepared, images(32), learn_rounding=False)
    return freeze(prepared), policy


@cache
def plain() -> tuple[QuantGraph, bytes, dict[str, str]]:
    frozen, _ = quantized(model("plain"), "w4a8")
    lowered = lower(frozen)
    return frozen, serialize(lowered), lowered.sites


def wide_middle(**options: object) -> tuple[QuantGraph, QuantGraph]:
    """A sandwich whose middle has 16 bits: frozen, and in float."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Sandwich(**options)
    wide = LayerPolicy(name="middle", weight=weight_spec(16), activation=activation_spec(16))
    frozen, _ = quantized(net, Policy(layers=[wide]))
    return frozen, to_float(net, images())


def unguarded(data: bytes) -> bytes:
    """The file as it would be without the Max behind layers that stay wide."""
    proto = onnx.load_from_string(data)
    constants = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    count = 0
    for node in list(proto.graph.node):
        if node.op_type != "Max":
            continue
        count += 1
        if constants[node.input[1]] == 0:
            node.op_type = "Relu"
            del node.input[1]
        else:
            for reader in proto.graph.node:
                for i, name in enumerate(reader.input):
                    if name == node.output[0]:
                        reader.input[i] = node.input[0]
            proto.graph.node.remove(node)
    assert count
    return proto.SerializeToString()


# -- every kind of network ------------------------------------------------------------------------

CASES = [  # `mixed` goes through 16, 8 and 4 bits and 4-bit activations in every network
    *((n, "mixed") for n in KINDS),
    *((n, "w4a8") for n in ("depthwise", "tokens", "transposed")),
    *((n, "w16a16") for n in ("functional", "isle", "tokens")),
    ("depthwise", "w8a4"),
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_file_runs_as_promised_and_answers_as_the_simulation(name, kind, tmp_path):
    frozen, _ = quantized(model(name), kind)
    batch = images(96, seed=3)
    result = to_onnx(frozen, tmp_path / "m.onnx", images=batch)
    onnx.checker.check_model(str(result.path), full_check=True)
    rows = {row.name: row for row in result.certificate.layers}
    assert list(rows) == list(frozen.layers)
    for layer, plan in frozen.plans.items():
        row = rows[layer]
        assert row.integer == plan.support.integer
        assert row.stored == f"INT{plan.choice.weight_bits}"
        assert row.macs == frozen.layers[layer].macs
        assert row.asked == f"W{plan.choice.weight_bits}A{plan.choice.activation_bits}"
        assert bool(row.reason) != row.integer  # a reason for all that runs in float
    report = result.verification
    assert report is not None
    assert min(report.top1_agreement, report.top1_agreement_unoptimized) > 0.98
    assert report.logits_sqnr_db > 35
    assert len(report.layers) >= len(frozen.sites)
    for row in report.layers:
        assert row.max_step <= (2 if name in DEEP else 1), row
        assert max(row.own_step, row.own_step_unoptimized) <= 1, row
        assert row.equal_fraction > 0.99, row


def test_the_networks_answer_with_several_classes():
    for name in KINDS:
        assert model(name)(images(96, seed=3)).argmax(1).unique().numel() > 2, name


@pytest.mark.parametrize(
    ("name", "operators", "boundaries"),
    [
        ("residual", "QLinearAdd", 1),
        ("concat", "QLinearConcat", 1),
        ("se_sigmoid", "QLinearMul", 1),
        ("se_hardsigmoid", "QLinearMul", 1),
        ("gated", "QLinearSigmoid QLinearAdd", 1),
        ("pre_activation", "QLinearAdd", 1),
        ("attention", "MatMulIntegerToFloat", 8),
        ("stem", "QLinearAveragePool", 1),
        ("global_mean", "QLinearGlobalAveragePool", 1),
        ("shuffle", "QLinearConcat", 1),
        ("tokens", "MatMulIntegerToFloat", 3),
        ("functional", "QGemm", 1),
    ],
)
def test_operations_between_layers_stay_integers(name, operators, boundaries):
    """One boundary is the input's own quantization."""
    frozen, _ = quantized(model(name), "w8a8")
    certificate = certify(serialize(lower(frozen)))
    assert all(layer.integer for layer in certificate.layers)
    # Only products of two activations are besides: queries with keys, weights with values.
    assert (certificate.integer_macs_fraction < 1) == (name == "attention")
    assert [part.macs for part in certificate.besides] == [4096] * 2 * (name == "attention")
    assert set(operators.split()) <= set(certificate.operators)
    assert certificate.boundaries == boundaries


@pytest.mark.parametrize(("name", "copies"), [("residual", 1), ("option_a", 1), ("plain", 0)])
def test_residual_sums_may_have_more_bits_than_the_layers_that_read_them(name, copies, tmp_path):
    narrow = Policy.uniform(4, 4)
    policy = narrow.replace(default=narrow.default.replace(residual_bits=7))
    frozen, _ = quantized(model(name), Policy.from_yaml(policy.to_yaml()))
    bits = [site.spec.bits for site in frozen.sites.values()]
    assert {site.spec.bits for site in frozen.sites.values() if site.readers} == {4}
    assert bits.count(7) == 2 * copies  # both terms of the sum
    assert sum(name.startswith("quantizers.branches") for name in frozen.sites) == copies
    result = to_onnx(frozen, tmp_path / "m.onnx", images=images(96, seed=3))
    certificate, report = result.certificate, result.verification
    assert certificate.integer_macs_fraction == 1
    assert certificate.operators.get("QLinearLeakyRelu", 0) == copies
    assert report is not None
    assert report.top1_agreement > 0.98


def test_a_convolution_may_be_the_output(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, nets.CLASSES, 10), nn.Flatten())
    frozen, _ = quantized(net.eval(), "w8a8")
    result = to_onnx(frozen, tmp_path / "m.onnx", images=images(16))
    assert [row.executed for row in result.certificate.layers] == ["QLinearConv"] * 2
    assert result.certificate.boundaries == 2  # the network's input and its output
    assert result.verification is not None
    assert result.verification.max_step <= 1


def test_a_network_in_channels_last_has_the_file_of_the_same_network(tmp_path):
    files = []
    for layout in (torch.contiguous_format, torch.channels_last):
        graph = to_float(model("residual"), images())
        graph.module.to(memory_format=layout)
        float_to_onnx(graph, tmp_path / "m.onnx")
        files.append((tmp_path / "m.onnx").read_bytes())
        assert next(graph.module.parameters()).is_contiguous(memory_format=layout)
    assert files[0] == files[1]


def test_a_module_that_branches_on_shapes_is_compared_too():
    """Tracing kept it whole, as an island; recording opens it, so its sites are the graph's own."""
    frozen, _ = quantized(model("isle"), "w8a8")
    assert not frozen.islands
    lowered = lower(frozen)
    report = verify(frozen, serialize(lowered), lowered.sites, images(8))
    compared = {row.name for row in report.layers}
    assert compared == {name.removeprefix("quantizers.") for name in frozen.sites}
    readers = {reader for site in frozen.sites.values() for reader in site.readers}
    assert {"isle.conv", "isle.mix"} <= readers


def test_layers_named_like_values_are_told_apart():
    """Values of a file are called a, b, c: a layer of that name is none of them."""
    net = nn.Sequential()
    sizes = zip("cab", (3, 8, 8), strict=True)
    for name, channels in sizes:
        net.add_module(name, nn.Conv2d(channels, 8, 3))
        net.add_module(f"{name}_relu", nn.ReLU())
    net.add_module("d", Head(8))
    frozen, _ = quantized(
        net,
        Policy(layers=[LayerPolicy(name="a", weight=weight_spec(16), activation="float")]),
    )
    rows = certify(serialize(lower(frozen))).layers
    assert [(r.name, r.integer) for r in rows] == [
        *(("c", True), ("a", False), ("b", True)),
        ("d.2", True),
    ]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_both_granularities_of_weights_fuse(granularity):
    policy = Policy.model_validate({"default": {"weight": f"int8/{granularity}"}})
    frozen, _ = quantized(model("plain"), policy)
    certificate = certify(serialize(lower(frozen)))
    assert certificate.integer_macs_fraction == 1


# -- the file itself ------------------------------------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_bn(3, 64), nn.ReLU(), *conv_bn(64, 64), nn.ReLU(), *conv_bn(64, 64), nn.ReLU()
        )
        self.head = Head(64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_file_is_little_more_than_its_weights(bits, tmp_path):
    frozen, _ = quantized(Wide().eval(), Policy.uniform(bits))
    result = to_onnx(frozen, tmp_path / "m.onnx")
    weights = sum(layer.weight_bytes(bits) for layer in frozen.layers.values())
    assert weights < result.bytes == result.path.stat().st_size
    assert result.bytes <= 1.15 * weights


def test_four_bits_are_packed_two_to_a_byte():
    frozen, data, _ = plain()
    stored = {
        tuple(t.dims): t
        for t in onnx.load_from_string(data).graph.initializer
        if t.data_type == onnx.TensorProto.INT4
    }
    assert len(stored) == len(frozen.layers)
    for path in frozen.layers:
        weight = frozen.module.get_submodule(path).weight
        tensor = stored[tuple(weight.shape)]
        assert len(tensor.raw_data) == (weight.numel() + 1) // 2
        assert np.array_equal(numpy_helper.to_array(tensor).astype(np.int8), weight.numpy())


def test_layers_may_share_their_weights_in_the_file():
    frozen, _ = quantized(model("shared"), "w16a16")
    assert len(frozen.layers) == 4  # one of them is called twice
    proto = onnx.load_from_string(serialize(lower(frozen)))
    stored = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT16]
    assert len(stored) == len(frozen.layers) - 1


def test_the_policy_travels_in_the_file(tmp_path):
    qg = to_float(model("plain"), images())
    first, *others = policy_for("mixed", list(qg.layers)).layers
    policy = Policy(
        model=ModelInfo(arch="a", classes=5, normalize="cifar10", input=(3, 12, 12)),
        evidence={"long": list(range(1000))},
        layers=[first.replace(reason="because"), *others],
    )
    frozen, _ = quantized(model("plain"), policy)
    path = to_onnx(frozen, tmp_path / "m.onnx").path
    props = runtime.metadata(runtime.session(path))
    assert len(props[KEY]) < 1500
    back = from_metadata(props, "m.onnx")
    assert back is not None
    assert back.model == policy.model
    assert back.evidence == {}
    names = list(frozen.layers)
    widths = [(c.weight, c.activation) for c in back.resolve(names).values()]
    assert widths == [(c.weight, c.activation) for c in policy.resolve(names).values()]
    assert certify(path) == certify(path, frozen)


def test_a_policy_that_cannot_be_read_is_named():
    assert from_metadata({}, "m.onnx") is None
    assert from_metadata({KEY: to_metadata(Policy())}, "m.onnx") == Policy()
    for text in ("{", "{}", '{"policy": {"version": 1, "new": 2}}'):
        with pytest.raises(PolicyError, match=r"inside m\.onnx cannot be read"):
            from_metadata({KEY: text}, "m.onnx")


@pytest.mark.parametrize("name", ["residual", "shared"])
def test_the_float_file_is_the_float_model(name, tmp_path):
    net = model(name)
    path = float_to_onnx(to_float(net, images()), tmp_path / "f.onnx")
    got = runtime.run(runtime.session(path), images(5).numpy())
    with torch.no_grad():
        assert np.allclose(got, net(images(5)).numpy(), atol=1e-5)
    certificate = certify(path)
    assert certificate.integer_macs_fraction == 0
    assert {row.stored for row in certificate.layers} == {"FLOAT"}
    assert not certificate.broken()


def test_nothing_of_the_exporter_stays_in_the_file():
    _, data, _ = plain()
    assert b"torch" not in data
    assert b"onnxscript" not in data


def test_any_batch_size_runs():
    _, data, _ = plain()
    loaded = runtime.session(data)
    one, many = (runtime.run(loaded, images(7)[:n].numpy(), batch=n) for n in (1, 7))
    assert np.allclose(one[0], many[0], atol=1e-6)


# -- traps of the runtime -------------------------------------------------------------------------


@pytest.mark.parametrize("pool", [False, True])
def test_a_wide_layer_between_integers_keeps_its_weights(pool):
    """onnxruntime gives 8-bit weights to a float layer that QuantizeLinear follows (T1)."""
    frozen, _ = wide_middle(pool=pool)
    lowered = lower(frozen)
    data = serialize(lowered)
    batch = images(16, seed=5)
    site = next(s.name for s in frozen.sites.values() if "last" in s.readers).split(".")[1]

    def errors(file: bytes):
        report = verify(frozen, file, lowered.sites, batch)
        return next(row.equal_fraction for row in report.layers if row.name == site)

    assert errors(data) > 0.999
    assert not certify(data, frozen).broken()
    broken = certify(unguarded(data), frozen).broken()
    assert [row.name for row in broken] == ["middle"]
    assert errors(unguarded(data)) < 0.99


def test_a_large_bias_of_a_wide_layer_stays_float():
    """The same pass writes the bias as int32, of a scale so small that it may overflow (T2)."""
    frozen, floats = wide_middle(bias=40.0)
    data = serialize(lower(frozen))
    batch = images(16, seed=5)
    with torch.no_grad():
        wanted = floats.module(batch).numpy()
    got = runtime.run(runtime.session(data), batch.numpy())
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    graph = runtime.optimized_model(data).graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    conv = next(n for n in graph.node if n.op_type == "Conv")
    assert kinds[conv.input[2]] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize(
    "between",
    [
        "m = Identity(c)",
        "m = Relu(c)",
        "m = MaxPool<kernel_shape=[2,2]>(c)",
        "k = Relu(c)\n m = MaxPool<kernel_shape=[2,2]>(k)",
        "k = Clip(c, zero)\n m = Transpose<perm=[0,2,3,1]>(k)",
        "k = Transpose<perm=[0,2,3,1]>(c)\n m = Reshape(k, shape)",
    ],
)
def test_the_guard_holds_where_the_runtime_moves_quantizers_up(between):
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[N,4,8,8] x) => (float[N,a,b,c] y) {{
      q = QuantizeLinear(x, s, z)
      d = DequantizeLinear(q, s, z)
      c = Conv<kernel_shape=[3,3], pads=[1,1,1,1]>(d, w, bias)
      {between}
      e = QuantizeLinear(m, s, z)
      y = DequantizeLinear(e, s, z)
    }}"""
    proto = onnx.parser.parse_model(text)
    constants = {
        "s": np.float32(0.02),
        "z": np.uint8(0),
        "w": np.random.default_rng(0).standard_normal((4, 4, 3, 3)).astype(np.float32),
        "bias": np.zeros(4, np.float32),
        "zero": np.float32(0),
        "shape": np.array([0, 8, 16, 2]),
    }
    for name, array in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    proto.graph.node[2].name = "conv"
    wide = Policy(default={"weight": "float", "activation": "float"})
    proto.metadata_props.add(key=KEY, value=to_metadata(wide))
    before = certify(proto.SerializeToString())
    assert before.broken(), before.operators
    guarded = ir.from_proto(proto)
    place(guarded)
    after = certify(ir.to_proto(guarded).SerializeToString())
    assert not after.broken(), after.operators


class Clamped(nn.Module):
    """A linear layer, an activation, and what reads that in float."""

    def __init__(self, act: nn.Module, *, bias: bool) -> None:
        super().__init__()
        self.first, self.act, self.norm = nn.Linear(16, 16, bias=bias), act, nn.LayerNorm(16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.act(self.first(x))))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-2, 2)])
@pytest.mark.parametrize(("steps", "bias"), [((), True), ((), False), ((5,), False)])
def test_an_activation_read_in_float_keeps_no_linear_layer_from_integers(
    tmp_path, act, steps, bias
):
    x = torch.randn(8, *steps, 16, generator=torch.Generator().manual_seed(0))
    graph = prepare(to_float(Clamped(act, bias=bias).eval(), x[:2]), Policy.uniform(8))
    calibrate(graph, x)
    made = to_onnx(graph, tmp_path / "m.onnx", images=x)
    assert made.certificate.integer_macs_fraction == 1
    assert made.verification.max_own_step <= 1


def edit(data: bytes, change) -> bytes:
    """The file with the initializers that `change(graph, constants)` replaces."""
    proto = onnx.load_from_string(data)
    tensors = {t.name: t for t in proto.graph.initializer}
    for name, array in change(proto.graph, tensors).items():
        fresh = f"{name}.changed"
        proto.graph.initializer.append(numpy_helper.from_array(array, fresh))
    return proto.SerializeToString()


def test_the_scale_of_a_bias_must_be_that_of_input_times_weight():
    """T3: at 5 % off, the convolution is float, and the certificate says so."""
    frozen, data, _ = plain()

    def change(graph, tensors):
        decode = {n.output[0]: n for n in graph.node}
        conv = next(n for n in graph.node if n.op_type == "Conv")
        scale = decode[decode[conv.input[2]].input[1]]
        assert scale.op_type == "Mul"
        name = scale.input[1]
        scale.input[1] = f"{name}.changed"
        return {name: numpy_helper.to_array(tensors[name]) * np.float32(1.05)}

    broken = certify(edit(data, change), frozen).broken()
    assert [row.name for row in broken] == [next(iter(frozen.layers))]
    assert "asked for W4A8, but the runtime executes" in broken[0].reason
    assert "dequantized at every run" in broken[0].reason


def test_zero_points_of_a_gemm_are_written_out():
    """T6: without them a Gemm with a scale per channel is not fused, or fails."""
    frozen, data, _ = plain()
    proto = onnx.load_from_string(data)
    decode = {n.output[0]: n for n in proto.graph.node}
    gemm = next(n for n in proto.graph.node if n.op_type == "Gemm")
    zeros = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    weights = decode[gemm.input[1]]
    assert zeros[weights.input[2]].dtype == np.int8
    assert zeros[weights.input[2]].tolist() == [0] * nets.CLASSES
    del weights.input[2]
    broken = certify(proto.SerializeToString(), frozen).broken()
    assert [row.name for row in broken] == [gemm.name]


# -- refusals -------------------------------------------------------------------------------------


def mismatched() -> QuantGraph:
    """A graph whose first layer believes in another input scale: it cannot fuse."""
    frozen = plain()[0].copy()
    layer = frozen.module.get_submodule(next(iter(frozen.layers)))
    layer.x_scale.mul_(1.1)
    return frozen


def test_a_broken_promise_fails_the_export(tmp_path):
    path = tmp_path / "m.onnx"
    first = r"features\.0: asked for W4A8"
    with pytest.raises(ExportError, match=f"1 of 3 layers do not run as asked: {first}.*--allow"):
        to_onnx(mismatched(), path)
    assert not list(tmp_path.iterdir())
    result = to_onnx(mismatched(), path, allow_float_fallback=True)
    assert isinstance(result, ExportResult)
    assert [row.name for row in result.certificate.broken()] == ["features.0"]
    assert 0 < result.certificate.integer_macs_fraction < 1
    assert path.stat().st_size == result.bytes


class Noise(nn.Module):
    """Answers differently each time, so that no file can answer as it does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        return self.head(x * torch.rand_like(x) * 50)


def test_other_answers_fail_the_export_and_leave_what_was_there(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"before")
    frozen, _ = quantized(Noise().eval(), "w8a8")
    with pytest.raises(ExportError, match=r"does not answer as the simulation does: .*must be"):
        to_onnx(frozen, path, images=images(64))
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert path.read_bytes() == b"before"


def test_verification_sees_changed_weights():
    frozen, data, sites = plain()
    batch = images(64, seed=7)
    report = verify(frozen, data, sites, batch)
    assert not report.failures()
    changed = frozen.copy()
    changed.module.get_submodule("features.4").weight.neg_()
    failures = " ".join(verify(changed, data, sites, batch).failures())
    assert "steps off by itself with default options" in failures
    assert "steps off by itself with optimizations off" in failures
    assert "logits: SQNR" in failures


def test_verification_sees_a_changed_scale():
    frozen, data, sites = plain()

    def change(graph, tensors):
        node = next(n for n in graph.node if n.op_type == "QuantizeLinear")
        name = node.input[1]
        node.input[1] = f"{name}.changed"
        return {name: numpy_helper.to_array(tensors[name]) * np.float32(3)}

    report = verify(frozen, edit(data, change), sites, images(64, seed=7))
    assert report.max_step > 20
    assert any(re.match(r"x: \d\d+ steps off by itself", f) for f in report.failures())
    own = {row.name: row.own_step for row in report.layers}
    assert own.pop("x") > 20
    assert max(own.values()) <= 1  # what follows is given the integers that the file really has


def test_verification_needs_images():
    with pytest.raises(ExportError, match="at least one image"):
        verify(*plain(), images(3)[:0])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ExportError, match=r"file.m\.onnx cannot be written: .*Name a folder"):
        to_onnx(plain()[0], tmp_path / "file" / "m.onnx")


def test_what_cannot_be_lowered_is_told(tmp_path):
    with pytest.raises(ExportError, match="Got stage 'prepared'"):
        lower(prepare(to_float(model("plain"), images()), Policy()))
    frozen = freeze(prepare(to_float(build("island"), images()), Policy()))
    with pytest.raises(ExportError, match=r"torch\.onnx cannot export the model"):
        to_onnx(frozen, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_names():
    assert export.to_onnx is to_onnx
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = export.nothing


# -- files of others ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign_float(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    return float_to_onnx(to_float(model("depthwise"), images()), folder / "float.onnx")


def test_the_runtimes_own_int8_files_are_certified(foreign_float, tmp_path):
    static = onnxruntime_static(foreign_float, tmp_path / "s.onnx", images(32).numpy())
    certificate = certify(static)
    floats = certify(foreign_float)
    assert [(r.asked, r.stored) for r in certificate.layers] == [("-", "INT8")] * 5
    assert {r.executed for r in certificate.layers} == {"QLinearConv", "QGemm"}
    assert certificate.integer_macs_fraction == 1
    assert [r.macs for r in certificate.layers] == [r.macs for r in floats.layers]
    assert not certificate.broken()
    dynamic = certify(onnxruntime_dynamic(foreign_float, tmp_path / "d.onnx"))
    assert {r.executed for r in dynamic.layers} == {"ConvInteger", "DynamicQuantizeMatMul"}
    assert dynamic.integer_macs_fraction == 1


def test_four_bits_without_a_cast_run_in_float_and_are_found_out():
    """What other tools write: INT4 straight into DequantizeLinear, decoded at every run."""
    _, data, _ = plain()
    proto = onnx.load_from_string(data)
    casts = {n.output[0]: n for n in proto.graph.node if n.op_type == "Cast"}
    assert len(casts) == 3
    for node in proto.graph.node:
        for i, name in enumerate(node.input):
            if name in casts:
                node.input[i] = casts[name].input[0]
        if node.op_type == "DequantizeLinear" and node.input[0] in {
            c.input[0] for c in casts.values()
        }:
            del node.input[2:]
    for cast in casts.values():
        proto.graph.node.remove(cast)
    del proto.metadata_props[:]
    rows = certify(proto.SerializeToString()).layers
    convs = [row for row in rows if row.name.startswith("features")]
    assert [row.stored for row in convs] == ["INT4", "INT4"]
    assert not any(row.integer for row in convs)
    assert all("dequantized at every run" in row.reason for row in convs)


def test_what_is_no_file_is_told(tmp_path):
    with pytest.raises(UsageError, match=r"absent\.onnx does not exist"):
        certify(tmp_path / "absent.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match=r"bad\.onnx must be an ONNX model"):
        certify(tmp_path / "bad.onnx")
