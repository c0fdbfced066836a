from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from mpq.quant import ops
from mpq.quant.fake_quant import FakeQuant, FrozenQuant
from mpq.quant.layer import FrozenLayer, IslandLayer, QuantLayer
from mpq.quant.operation import LayerOp, integer_bias, refusal
from mpq.spec import QuantSpec, activation_spec, weight_spec

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear_3d": (lambda: nn.Linear(6, 5, bias=False), (2, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 4, 3, 2, 1), (2, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, padding=1), (2, 6, 7, 7)),
    "conv2d_same": (lambda: nn.Conv2d(6, 8, (3, 5), padding="same", dilation=2), (2, 6, 9, 9)),
    "conv2d_valid": (lambda: nn.Conv2d(6, 8, 2, padding="valid", bias=False), (2, 6, 7, 7)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, stride=2, groups=2), (2, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 3), (1, 2, 5, 5, 5)),
}
TRANSPOSED = {
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), (2, 6, 5, 5)),
    "transposed_grouped": (lambda: nn.ConvTranspose2d(6, 4, 2, groups=2), (2, 6, 5, 5)),
    "transposed_1d": (lambda: nn.ConvTranspose1d(6, 4, 2), (2, 6, 5)),
}
FORMATS = list(itertools.product((2, 4, 8), (4, 8), ("tensor", "channel")))


def make(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        factory, shape = {**LAYERS, **TRANSPOSED}[name]
        return factory(), torch.randn(shape)


def source_for(x: Tensor, bits: int) -> FakeQuant:
    source = FakeQuant(activation_spec(bits)).eval()
    source.set_range(x.amin(), x.amax())
    return source


def oracle(layer: QuantLayer, x: Tensor, source: FakeQuant) -> Tensor:
    """The layer in int64, scaled at the end in float32."""
    scale, x_scale = layer.step().detach(), source.step().detach()
    q = torch.round(x / x_scale).to(torch.int64)
    weight, op = layer.integers().to(torch.int64), layer.op
    if op.kind == "linear":
        acc = q @ weight.T
        shape = (-1,)
    else:
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(op.stride)]
        acc = conv(q, weight, None, op.stride, op.padding, op.dilation, op.groups)
        shape = (-1,) + (1,) * len(op.stride)
    total = x_scale * scale
    if layer.bias is not None:
        bias = np.rint(layer.bias.detach().double().numpy() / total.double().numpy())
        acc = acc + torch.from_numpy(bias).to(torch.int64).view(shape)
    assert acc.abs().max() < 2**24
    return acc.float() * (total if total.ndim == 0 else total.view(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_integer_layer(name: str):
    for bits, act, granularity in FORMATS:
        module, x = make(name)
        source = source_for(x, act)
        layer = QuantLayer(module, QuantSpec(bits, True, granularity), source).eval()
        with torch.no_grad():
            x = source(x)
            prepared = layer(x)
            assert torch.equal(prepared, oracle(layer, x, source)), (bits, act, granularity)
            assert torch.equal(layer.frozen()(x), prepared), (bits, act, granularity)


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_float_layer_on_stored_integers(name: str):
    module, x = make(name)
    for bits in (4, 8, 16):
        layer = QuantLayer(copy.deepcopy(module), weight_spec(bits), None).eval()
        with torch.no_grad():
            out, exact = layer(x), module(x)
            assert torch.equal(layer.frozen()(x), out), bits
        assert layer.integers().dtype == (torch.int16 if bits == 16 else torch.int8)
        assert float((out - exact).abs().max()) < 2.0 ** (2 - bits) * float(exact.abs().max() + 1)


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_without_quantization_it_is_the_float_layer(name: str):
    module, x = make(name)
    layer = QuantLayer(copy.deepcopy(module), weight_spec(4), None)
    layer.enabled = False
    with torch.no_grad():
        assert torch.equal(layer(x), module(x))


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_training_reaches_weight_bias_and_step(name: str):
    module, x = make(name)
    layer = QuantLayer(module, weight_spec(4), None).train()
    layer(x).square().sum().backward()
    for key, parameter in layer.named_parameters():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.ne(0).any()), key


def test_training_and_eval_agree_on_a_calibrated_layer():
    module, x = make("conv2d")
    source = source_for(x, 8)
    layer = QuantLayer(module, weight_spec(4), source)
    with torch.no_grad():
        x = source(x)
        trained, evaluated = layer.train()(x), layer.eval()(x)
        # They differ by the rounding of the bias, half a step of the accumulator.
        step = float(source.step() * layer.step().amax())
    assert torch.allclose(trained, evaluated, atol=step)


def test_a_source_that_is_switched_off_means_float_arithmetic():
    module, x = make("conv2d")
    source = source_for(x, 8)
    layer = QuantLayer(module, weight_spec(8), source).eval()
    source.enabled = False
    plain = QuantLayer(module, weight_spec(8), None).eval()
    with torch.no_grad():
        assert torch.equal(layer(x), plain(x))


def test_the_source_is_no_child_and_survives_a_copy():
    module, x = make("conv2d")
    both = nn.ModuleDict({"source": source_for(x, 8)})
    both["layer"] = QuantLayer(module, weight_spec(8), both["source"])  # type: ignore[arg-type]
    twin = copy.deepcopy(both)
    assert twin["layer"].source is twin["source"]
    assert twin["layer"].source is not both["source"]
    assert sorted(both["layer"].state_dict()) == ["bias", "scale", "weight"]


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_weights_are_clip_free_at_first(name: str):
    module, _ = make(name)
    for granularity in ("tensor", "channel"):
        layer = QuantLayer(module, QuantSpec(8, True, granularity), None)  # type: ignore[arg-type]
        count = 1 if granularity == "tensor" else layer.weight.shape[layer.op.axis]
        assert layer.scale.numel() == count
        low, high = layer.integers().amin(), layer.integers().amax()
        assert max(int(high), -int(low) - 1) >= 126


def test_a_negative_or_zero_step_is_mended():
    module, x = make("linear")
    layer = QuantLayer(module, weight_spec(8), None).eval()
    with torch.no_grad():
        before = layer(x)
        layer.scale.neg_()
        assert torch.equal(layer(x), before)
        layer.scale.zero_()
        assert bool(torch.isfinite(layer(x)).all())


def test_integer_bias_stays_in_int32():
    bias = torch.tensor([1.0, -1e9, 1e9, 0.25])
    found = integer_bias(bias, torch.tensor([0.5, 1e-6, 1e-6, 0.5]))
    assert found.dtype == torch.int32
    assert found.tolist() == [2, -(2**31) + 1, 2**31 - 1, 0]


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (nn.Conv2d(3, 4, 2, padding="same"), "even kernel pads unevenly"),
        (nn.Bilinear(3, 4, 5), "Bilinear is not a layer"),
        (nn.LazyLinear(3), "LazyLinear is not a layer"),
    ],
)
def test_refusals_have_a_reason(module: nn.Module, reason: str):
    assert reason in (refusal(module) or "")


@pytest.mark.parametrize("name", [*LAYERS, *TRANSPOSED])
def test_the_operation_of_a_layer_is_read_off_it(name: str):
    module, x = make(name)
    assert refusal(module) is None
    op = LayerOp.of(module)
    with torch.no_grad():
        assert torch.equal(op.float(x, module.weight, module.bias), module(x))


@pytest.mark.parametrize("bits", [4, 8])
def test_frozen_quantizer_is_the_quantizer(bits: int):
    x = torch.randn(500, generator=torch.Generator().manual_seed(0)) * 4 + 1
    quantizer = source_for(x, bits)
    out, frozen = quantizer(x), FrozenQuant(quantizer)(x)
    assert torch.equal(out, frozen)
    assert len(out.unique()) <= 2**bits
    assert FrozenQuant(quantizer).zero_point.dtype == torch.uint8


@pytest.mark.parametrize("training", [True, False])
def test_a_ceiling_is_kept_by_range_step_and_pass_through(training: bool):
    x = torch.linspace(0, 20, 101)
    quantizer = FakeQuant(activation_spec(8), ceiling=6.0).train(training)
    quantizer.set_range(x.amin(), x.amax())
    with torch.no_grad():
        assert float(quantizer(x).max()) == pytest.approx(6.0)
        quantizer.scale.mul_(10)
        assert float(quantizer(x).max()) == pytest.approx(6.0)
        quantizer.scale.mul_(0.01)
        assert float(quantizer(x).max()) == pytest.approx(0.6)
        quantizer.enabled = False
        assert torch.equal(quantizer(x), x.clamp(max=6.0))


@pytest.mark.parametrize(("name", "act"), list(itertools.product(("conv2d", "linear"), (8, None))))
def test_island_layer(name: str, act: int | None):
    module, x = make(name)
    exact = copy.deepcopy(module)
    island = IslandLayer.of(module, weight_spec(8), activation_spec(act) if act else None).eval()
    quantizers = [m for m in (island.input, island.output) if isinstance(m, FakeQuant)]
    assert len(quantizers) == {("conv2d", 8): 2, ("linear", 8): 1}.get((name, act), 0)
    with torch.no_grad():
        for quantizer, values in zip(quantizers, (x, exact(x)), strict=False):
            quantizer.set_range(values.amin(), values.amax())
        out = island(x)
        assert torch.allclose(out, exact(x), atol=0.05)
        frozen = island.frozen()
        assert isinstance(frozen.layer, FrozenLayer)
        assert torch.equal(frozen(x), out)


def test_what_a_tracer_is_told_is_what_an_operator_gives():
    """A tracer is told shapes and strides without the arithmetic: they must be those of it."""
    x, scale = torch.randn(2, 6, 7, 7), torch.tensor(0.1)
    weight, bias = torch.ones(8, 3, 3, 3, dtype=torch.int8), torch.ones(8, dtype=torch.int32)
    rows, matrix = torch.randn(2, 3, 6), torch.ones(5, 6, dtype=torch.int8)
    zero = torch.tensor(3, dtype=torch.uint8)
    cases = (
        (ops.fake_quantize, (x.transpose(1, 3), scale, zero, 0, 255)),
        (ops.dequantize, (weight, torch.ones(8), 0)),
        (ops.conv, (x, scale, weight, torch.ones(8), bias, [2, 1], [1, 0], [1, 2], 2)),
        (ops.linear, (rows, scale, matrix, torch.ones(5), torch.ones(5, dtype=torch.int32))),
        (ops.dynamic_linear, (rows, matrix, torch.ones(5), torch.ones(5))),
    )
    for operator, args in cases:
        real, mode = operator(*args), FakeTensorMode()
        with mode:
            told = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
        assert isinstance(told, type(mode.from_tensor(real)))
        assert (told.shape, told.dtype, told.stride()) == (real.shape, real.dtype, real.stride())
