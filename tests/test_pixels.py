"""Files that take raw images: the same integers, the same kernels, and a deployer of 30 lines."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from nets import build, images
from torch import Tensor, nn

from mpq.data import Normalization
from mpq.data.normalize import NAMED
from mpq.errors import DataError, ExportError
from mpq.export import runtime, to_onnx
from mpq.export.bench import Timing, bench
from mpq.export.fileinfo import file_info
from mpq.export.lower import lower
from mpq.export.onnx_file import serialize, verify_file
from mpq.export.pixels import PixelInput
from mpq.export.verify import verify
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare
from mpq.policy import ModelInfo, Policy
from mpq.ptq import calibrate

CIFAR = NAMED["cifar10"]
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 12, 12, 3), np.uint8)
NORMALIZED = torch.from_numpy(CIFAR.apply(PIXELS))


def policy(bits: int = 8) -> Policy:
    info = ModelInfo(arch="a", classes=5, normalize="cifar10", input=(3, 12, 12))
    return Policy.uniform(bits).replace(model=info)


@cache
def quantized(bits: int = 8) -> QuantGraph:
    graph = prepare(build("residual"), policy(bits), images())
    calibrate(graph, NORMALIZED, method="minmax")
    return freeze(graph)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
def test_raw_images_give_the_answers_of_normalized_ones(
    bits: int, channels_last: bool, tmp_path: Path
):
    how = PixelInput(CIFAR, channels_last)
    plain = to_onnx(quantized(bits), tmp_path / "x.onnx")
    raw = to_onnx(quantized(bits), tmp_path / "p.onnx", images=NORMALIZED, pixels=how)
    onnx.checker.check_model(str(raw.path), full_check=True)
    assert raw.verification is not None
    assert raw.verification.max_step == 0
    assert raw.certificate.integer_macs_fraction == plain.certificate.integer_macs_fraction
    assert raw.certificate.boundaries == plain.certificate.boundaries
    takes = runtime.model_input(runtime.session(raw.path))
    assert (takes.integer, takes.channels_last) == (True, channels_last)
    want = runtime.run(runtime.session(plain.path), NORMALIZED.numpy())
    got = runtime.run(runtime.session(raw.path), PIXELS)
    # Integers from the first layer on: bit for bit. In float: the rounding of the sums.
    np.testing.assert_allclose(got, want, atol=0 if bits == 8 else 1e-5)
    assert verify_file(quantized(bits), raw.path, NORMALIZED).max_step == 0


def test_every_pixel_value_becomes_the_integer_of_the_simulation():
    """All 256 values of every channel; under the second one, two operations would not do."""
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None, None, None], (256, 12, 12, 3))
    for how in (NAMED["imagenet"], Normalization((0.1, 0.5, 0.9), (0.013, 1.7, 0.3))):
        batch = torch.from_numpy(how.apply(ramp))
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 10)).eval()
        graph = prepare(net, Policy.uniform(8), images())
        calibrate(graph, batch, method="minmax")
        frozen = freeze(graph)
        lowered = lower(frozen, None, PixelInput(how))
        report = verify(frozen, serialize(lowered), lowered.sites, batch, pixels=PixelInput(how))
        rows = {row.name: row for row in report.layers}
        assert rows["input_1"].equal_fraction == 1.0, how


def test_pixels_are_recovered_from_what_was_made_of_them():
    for how in NAMED.values():
        assert np.array_equal(PixelInput(how).pixels(how.apply(PIXELS)), PIXELS)


def test_bench_and_files_that_take_pixels(tmp_path: Path):
    path = to_onnx(quantized(), tmp_path / "p.onnx", pixels=PixelInput(CIFAR)).path
    labels = runtime.run(runtime.session(path), PIXELS).argmax(1).astype(np.int64)
    assert file_info(path).input == (3, 12, 12)
    (row,) = bench([path], images=PIXELS, labels=labels, timing=Timing(runs=2))
    assert row.top1 == 100.0


@pytest.mark.parametrize("channels", [1, 4, 5])
def test_pixels_have_the_channels_of_the_network(tmp_path: Path, channels: int):
    net = nn.Sequential(nn.Conv2d(channels, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    graph = prepare(net, Policy.uniform(8), torch.zeros(2, channels, 12, 10))
    images = torch.randint(0, 256, (8, channels, 12, 10)).float() / 255 * 2 - 1
    calibrate(graph, images, method="minmax")
    path = tmp_path / "m.onnx"
    with pytest.raises(DataError, match=rf"is for images of 3 channels, .* have {channels}"):
        to_onnx(graph, path, pixels=PixelInput(CIFAR))
    to_onnx(graph, path, images=images, pixels=PixelInput(Normalization.parse("0.5/0.5")))
    raw = np.zeros((1, 12, 10, channels), np.uint8)
    assert runtime.run(runtime.session(path), raw).shape == (1, 5 * 8 * 6)


def test_pixels_are_of_images(tmp_path: Path):
    graph = prepare(nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3)).eval(),
                    Policy.uniform(8), torch.zeros(2, 1, 12))  # fmt: skip
    calibrate(graph, torch.randn(2, 1, 12), method="minmax")
    with pytest.raises(ExportError, match=r"--input uint8 needs a network of images"):
        to_onnx(graph, tmp_path / "m.onnx", pixels=PixelInput(CIFAR))


def answers(path: Path, folder: Path) -> str:
    np.save(folder / "images.npy", PIXELS[:4])
    script = Path(__file__).resolve().parent.parent / "docs" / "deploy.py"
    command = [sys.executable, script, path, folder / "images.npy"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_deployer(channels_last: bool, tmp_path: Path):
    how = PixelInput(CIFAR, channels_last)
    path = to_onnx(quantized(), tmp_path / "p.onnx", pixels=how).path
    with torch.no_grad():
        classes: Tensor = quantized().module(NORMALIZED[:4]).argmax(1)
    told = answers(path, tmp_path).splitlines()
    assert [line.split(" (")[0] for line in told] == [
        f"{k}: class {c}" for k, c in enumerate(classes.tolist())
    ]
