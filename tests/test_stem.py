from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from nets import Head, conv_bn
from torch import Tensor, nn

import mpq
from mpq.export import place, runtime, to_onnx
from mpq.export.stem import Axis, spread
from mpq.spec import weight_spec


def blocks(x: Tensor) -> Tensor:
    """SpaceToDepth of 2x2 blocks as the ONNX specification words it."""
    n, c, h, w = x.shape
    order = x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4)
    return order.reshape(n, 4 * c, h // 2, w // 2)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, 5, 7])
@pytest.mark.parametrize("size", [8, 10])
def test_a_convolution_on_blocks_has_the_same_sums(kernel: int, size: int) -> None:
    rng = np.random.default_rng(kernel)
    x = torch.from_numpy(rng.integers(-128, 128, (2, 3, size, size))).double()
    weight = rng.integers(-128, 128, (5, 3, kernel, kernel)).astype(np.int8)
    found = 0
    for front, end in itertools.product(range(4), repeat=2):
        axis = Axis.of(size, kernel, front, end)
        if axis is None:
            continue
        found += 1
        want = F.conv2d(
            F.pad(x, (front, end, front, end)), torch.from_numpy(weight).double(), stride=2
        )
        padded = F.pad(blocks(x), (axis.front, axis.end, axis.front, axis.end))
        got = F.conv2d(padded, torch.from_numpy(spread(weight, axis, axis)).double())
        assert torch.equal(got, want)
    assert found > 8


def test_an_image_of_odd_size_has_no_blocks() -> None:
    assert Axis.of(225, 7, 3, 3) is None
    assert Axis.of(224, 7, 3, 3) == Axis(1, 4, 2, 1)
    assert Axis.of(224, 3, 1, 1) == Axis(1, 2, 1, 0)


class Strided(nn.Module):
    """A strided stem and a second convolution; `kernel`, `stride` and `groups` of the stem vary."""

    def __init__(self, kernel: int = 3, stride: int = 2, channels: int = 3, groups: int = 1):
        super().__init__()
        self.conv1, self.bn1 = conv_bn(channels, 4 * channels, kernel, stride, groups)
        self.conv2, self.bn2 = conv_bn(4 * channels, 8)
        self.head = Head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.head(F.relu(self.bn2(self.conv2(x))))


class TwoReaders(Strided):
    """Two layers read the image, so its integers must stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 12, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)) + self.other(x))
        return self.head(F.relu(self.bn2(self.conv2(x))))


def exported(net: nn.Module, path: Path, side: int = 16, bits: int = 8) -> tuple[bytes, Tensor]:
    torch.manual_seed(0)
    channels = net.conv1.in_channels
    images = torch.randn(16, channels, side, side)
    entries = [mpq.LayerPolicy(name="conv1", weight=weight_spec(bits))]
    policy = mpq.Policy.uniform(8).with_layers(*entries)
    graph = mpq.quantize_graph(mpq.prepare(net.eval(), policy, images), images)
    result = to_onnx(graph, path, images=images)
    assert {row.executed for row in result.certificate.layers} == {"QLinearConv", "QGemm"}
    return path.read_bytes(), images


@pytest.mark.parametrize(("kernel", "bits"), [(3, 8), (7, 8), (5, 4), (3, 5)])
def test_the_stem_runs_on_blocks_with_the_same_bits(
    kernel: int, bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(kernel)
    net = Strided(kernel)
    data, images = exported(net, tmp_path / "blocks.onnx", bits=bits)
    steps = tuple(step for step in place.STEPS if step is not place.block_stem)
    monkeypatch.setattr(place, "STEPS", steps)
    plain, _ = exported(net, tmp_path / "plain.onnx", bits=bits)
    assert b"SpaceToDepth" in data
    assert b"SpaceToDepth" not in plain
    ran = [runtime.run(runtime.session(file), images.numpy()) for file in (data, plain)]
    assert np.array_equal(*ran)


@pytest.mark.parametrize(
    ("net", "side"),
    [
        (Strided(stride=1), 16),
        (Strided(), 17),
        (Strided(channels=16), 16),
        (Strided(groups=3), 16),
        (TwoReaders(), 16),
    ],
    ids=["stride 1", "odd size", "many channels", "grouped", "two readers"],
)
def test_other_stems_stay_as_they_are(net: nn.Module, side: int, tmp_path: Path) -> None:
    data, _ = exported(net, tmp_path / "net.onnx", side)
    assert b"SpaceToDepth" not in data
