"""Transposed convolutions as integers: the same sums, in the runtime's own integer kernel."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from test_forms import RUNTIMES
from torch import Tensor, nn

import mpq
from mpq.errors import GraphError
from mpq.export import runtime, to_onnx
from mpq.export.exact import verify_exact
from mpq.export.onnx_file import verify_file
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare
from mpq.policy import Policy
from mpq.ptq import calibrate
from mpq.quant.fake_quant import FakeQuant
from mpq.quant.layer import QuantLayer
from mpq.quant.subpixel import axes_of, interleave, kernels, per_phase
from mpq.spec import activation_spec, weight_spec

FUNCTIONS: dict[int, tuple[Any, Any]] = {
    1: (F.conv1d, F.conv_transpose1d),
    2: (F.conv2d, F.conv_transpose2d),
}
WINDOWS = [
    (k, s, p, extra, d)
    for k, s, p, extra, d in itertools.product(range(1, 6), (1, 2, 3), range(4), (0, 1, 2), (1, 2))
    if extra < max(s, d) and (s == 1 or d == 1) and 5 * s - 2 * p + d * (k - 1) + extra >= 0
]
LAYERS = {
    "doubling": lambda: nn.ConvTranspose2d(8, 6, 2, 2),
    "odd": lambda: nn.ConvTranspose2d(8, 6, 3, 2, 1, 1),
    "overlapping": lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1),
    "dense": lambda: nn.ConvTranspose2d(8, 6, 3, padding=1, dilation=2),
    "unequal": lambda: nn.ConvTranspose2d(8, 6, (3, 2), (3, 2), bias=False),
}


class Up(nn.Module):
    """A transposed convolution between two ordinary ones."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), layer
        self.out = nn.Conv2d(6, 4, 3)
        self.head = nets.Head(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.out(F.relu(self.up(F.relu(self.down(x)))))))


def quantized(name: str, policy: Policy) -> QuantGraph:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Up(LAYERS[name]()).eval()
    graph = prepare(net, policy, nets.images())
    calibrate(graph, nets.images(16), method="minmax")
    return graph


def integers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, shape, generator=generator).double()


def rewritten(x: Tensor, weight: Tensor, window: tuple[tuple[int, ...], ...]) -> Tensor:
    axes, rank = axes_of(weight.shape[2:], *window), weight.ndim - 2
    padding = [axis.padding for axis in axes]
    out = FUNCTIONS[rank][0](x, kernels(weight, axes), None, 1, padding, window[3])
    return interleave(out, axes, x.shape[2:])


@pytest.mark.parametrize("rank", [1, 2])
def test_every_window_has_the_same_sums(rank: int):
    assert len(WINDOWS) > 150
    x = integers(2, 3, *(6, 7)[:rank])
    for kernel, *rest in WINDOWS:
        weight = integers(3, 4, *[kernel] * rank, seed=kernel)
        s, p, extra, d = ((n,) * rank for n in rest)
        want = FUNCTIONS[rank][1](x, weight, None, s, p, extra, 1, d)
        assert torch.equal(rewritten(x, weight, (s, p, extra, d)), want), (kernel, rest)


def test_axes_may_differ():
    x, weight = integers(2, 3, 6, 7), integers(3, 4, 5, 2)
    want = F.conv_transpose2d(x, weight, None, (3, 1), (2, 0), (1, 0))
    assert torch.equal(rewritten(x, weight, ((3, 1), (2, 0), (1, 0), (1, 1))), want)


def test_channels_follow_their_phases():
    axes = axes_of((2, 2), (2, 2), (0, 0), (0, 0), (1, 1))
    assert per_phase(torch.tensor([1, 2]), axes).tolist() == [1] * 4 + [2] * 4
    assert per_phase(torch.tensor(3.0), axes).shape == ()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_the_layer_multiplies_integers(name: str, granularity: Any):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module, x = LAYERS[name](), torch.randn(2, 8, 5, 6)
    source = FakeQuant(activation_spec(8)).eval()
    source.set_range(x.amin(), x.amax())
    spec = type(weight_spec(8))(8, True, granularity)
    layer = QuantLayer(module, spec, source).eval()
    with torch.no_grad():
        x = source(x)
        found = layer(x)
        assert torch.equal(layer.frozen()(x), found)
        scale, step = layer.step(), source.step()
        ints, op = torch.round(x / step).double(), layer.op
        window = (op.stride, op.padding, op.output_padding, 1, op.dilation)
        acc = F.conv_transpose2d(ints, layer.integers().double(), None, *window)
        total = step * scale
        if layer.bias is not None:
            acc += torch.round(layer.bias.double() / total.double()).reshape(-1, 1, 1)
        assert acc.abs().max() < 2**24
        factor = total if total.ndim == 0 else total.reshape(-1, 1, 1)
        assert torch.equal(found, acc.float() * factor)


@pytest.mark.parametrize(("name", "bits"), [("odd", 4), ("overlapping", 8), ("unequal", 3)])
def test_the_runtime_runs_them_as_integers(name: str, bits: int, tmp_path: Path):
    policy = Policy.uniform(bits, 8)
    graph, images = quantized(name, policy), nets.images(16, seed=3)
    result = to_onnx(graph, tmp_path / "m.onnx", images=images)
    assert result.certificate.integer_macs_fraction == 1.0
    assert result.certificate.boundaries == 1
    assert not any(row.broken or row.reason for row in result.certificate.layers)
    assert result.verification is not None
    assert result.verification.max_own_step <= 1
    assert len(result.verification.layers) == len(graph.sites)
    onnx.checker.check_model(str(result.path), full_check=True)
    report = verify_exact(result.path, images[:2].numpy())
    assert report.exact
    assert not report.unpredicted()
    assert len(verify_file(graph, result.path, images).layers) == len(graph.sites)


def test_the_file_holds_the_kernel_without_its_zeros(tmp_path: Path):
    policy = Policy.uniform(8, 8)
    path = to_onnx(quantized("odd", policy), tmp_path / "m.onnx").path
    shapes = [tuple(t.dims) for t in onnx.load(path).graph.initializer]
    assert (8, 6, 3, 3) in shapes
    ran = [tuple(t.dims) for t in runtime.optimized_model(path).graph.initializer]
    assert (6 * 4, 8, 2, 2) in ran


def test_old_runtimes_take_it_in_their_own_operations(tmp_path: Path):
    policy, images = Policy.uniform(8, 8), nets.images(16, seed=3)
    graph = freeze(quantized("overlapping", policy))
    new = to_onnx(graph, tmp_path / "new.onnx", images=images)
    old = to_onnx(graph, tmp_path / "old.onnx", images=images, min_runtime="1.18")
    assert new.certificate.needs == "onnxruntime>=1.23"
    assert new.certificate.operators["DepthToSpace"] == 1
    assert old.certificate.needs == "onnxruntime>=1.18"
    assert "DepthToSpace" not in old.certificate.operators
    assert old.certificate.integer_macs_fraction == 1.0
    here = runtime.run(runtime.session(new.path), images.numpy())
    assert np.array_equal(runtime.run(runtime.session(old.path), images.numpy()), here)
    for version in RUNTIMES.installed():
        answer, operators = RUNTIMES.run_in(version, old.path, images.numpy())
        np.testing.assert_allclose(answer, here, atol=1e-6)
        assert operators["QLinearConv"] == 3
        if tuple(map(int, version.split(".")[:2])) < (1, 23):
            with pytest.raises(RuntimeError):
                RUNTIMES.run_in(version, new.path, images.numpy())


class Decoder(nn.Module):
    """Gives its image's height and width, said in each way that torch takes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.down(x))
        if self.how == "twice":
            return (
                self.up(y, output_size=x.shape[-2:])[..., :7, :7] + self.up(-y, None)[..., :7, :7]
            )
        said = {"shape": x.shape[-2:], "whole": x.size(), "fixed": [8, 9]}
        return self.up(y, said[self.how])


@pytest.mark.parametrize("how", ["shape", "whole", "fixed", "twice"])
def test_an_output_size_is_taken_at_every_size_of_the_image(how: str, tmp_path: Path):
    torch.manual_seed(0)
    network, free = Decoder(how).eval(), how in ("shape", "whole")
    quantized = mpq.ptq(network, torch.rand(16, 3, 8, 9), mpq.Policy.uniform(8))
    dynamic = ["batch", "height", "width"] if free else ["batch"]
    mpq.export(quantized, tmp_path / "m.onnx", dynamic_axes=dynamic)
    session = runtime.session(tmp_path / "m.onnx")
    assert network.up.output_padding == (0, 0)
    for shape in [(3, 3, 8, 9)] + [(2, 3, 11, 14)] * free:
        x = torch.rand(shape)
        (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        float_answer = network(x).detach()
        np.testing.assert_allclose(answer, quantized.module(x).detach(), atol=1e-5)
        assert answer.shape == float_answer.shape
        assert (torch.tensor(answer) - float_answer).norm() < 0.05 * float_answer.norm()


class Normed(Decoder):
    """A decoder with what folds into its convolution."""

    def __init__(self, how: str) -> None:
        super().__init__(how)
        self.norm, self.out = nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.norm(super().forward(x))))


def test_a_norm_is_folded_before_the_crop_to_an_output_size(tmp_path: Path):
    torch.manual_seed(0)
    network = Normed("shape").eval()
    nn.init.uniform_(network.norm.running_var, 0.5, 2)
    images = torch.rand(16, 3, 8, 9)
    assert [*prepare(network, Policy.uniform(8, 8), images).layers] == ["down", "up", "out"]
    quantized = mpq.ptq(network, images, mpq.Policy.uniform(8))
    mpq.export(quantized, tmp_path / "m.onnx", dynamic_axes=["batch", "height", "width"])
    x = torch.rand(2, 3, 11, 14)
    answer = torch.tensor(runtime.run(runtime.session(tmp_path / "m.onnx"), x.numpy()))
    torch.testing.assert_close(answer, network(x).flatten(1), atol=0.05, rtol=0.05)


def test_an_output_size_in_numbers_holds_the_image_s(tmp_path: Path):
    quantized = mpq.ptq(Decoder("fixed").eval(), torch.rand(16, 3, 8, 9), mpq.Policy.uniform(8))
    with pytest.raises(GraphError, match=r"width cannot be dynamic: the output of up is cropped"):
        mpq.export(quantized, tmp_path / "m.onnx", dynamic_axes=["batch", "width"])


class Shuffling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.b(F.relu(self.a(F.pixel_unshuffle(x, 2)))), 2) + x


@pytest.mark.parametrize("free", [("height", "width"), ("width",), ("height",)])
def test_a_shuffle_of_bytes_is_right_at_every_size(free: tuple[str, ...], tmp_path: Path):
    torch.manual_seed(0)
    quantized = mpq.ptq(Shuffling().eval(), torch.rand(16, 3, 8, 8), mpq.Policy.uniform(8))
    mpq.export(quantized, tmp_path / "m.onnx", dynamic_axes=["batch", *free])
    session = runtime.session(tmp_path / "m.onnx")
    x = torch.rand(2, 3, 12 if "height" in free else 8, 10 if "width" in free else 8)
    (answer,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(answer, quantized.module(x).detach(), atol=1e-5)


def test_what_gains_nothing_stays_in_float():
    plans = prepare(nets.build("transposed"), Policy.uniform(8, 8), nets.images()).plans
    assert plans["up1"].site is not None
    assert plans["up2"].site is None
    assert "a transposed convolution in groups has no integer form" in plans["up2"].notes[-1]
    layer = nn.ConvTranspose2d(8, 6, 3, 2, dilation=2)
    notes = prepare(Up(layer).eval(), Policy.uniform(8, 8), nets.images()).plans["up"].notes
    assert "with both stride and dilation" in notes[-1]
