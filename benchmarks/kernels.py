"""What single forms cost in onnxruntime: the measurements behind docs/speed.md.

    python benchmarks/kernels.py [--rounds 40]

Each form is a small file of random weights; forms of one row take turns, and answers of forms that
must be equal are compared. Microseconds are CPU time of one thread, the least of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpq.export import runtime
from mpq.export.bench import interleave
from mpq.export.stem import Axis, spread
from mpq.quant import subpixel

Array = NDArray[Any]
SCALE, STEP = np.float32(0.02), np.float32(5e-4)


class Net:
    """A chain of nodes on one tensor under construction, `float` until it is quantized."""

    def __init__(self, shape: tuple[int, ...], zero: int = 0, dtype: type = np.uint8) -> None:
        self.shape, self.nodes, self.at = shape, [], "x"
        lowest = np.array(np.iinfo(dtype).min, dtype)  # behind a ReLU
        self.constants: dict[str, Array] = {"s": SCALE, "z": np.array(zero, dtype), "y": lowest}

    def op(self, kind: str, *constants: Array, **attributes: Any) -> Net:
        """A node on the current tensor."""
        names = []
        for value in constants:
            names.append(f"c{len(self.constants)}")
            self.constants[names[-1]] = np.asarray(value)
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.at, *names], [out], **attributes))
        self.at = out
        return self

    def with_names(self, kind: str, *names: str) -> Net:
        """A node on the current tensor and others that there are."""
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, [self.at, *names], [out]))
        self.at = out
        return self

    def grid(self, zero: str = "z") -> Net:
        """QuantizeLinear and DequantizeLinear."""
        self.with_names("QuantizeLinear", "s", zero)
        return self.with_names("DequantizeLinear", "s", zero)

    def conv(self, weight: Array, **attributes: Any) -> Net:
        """A convolution on integer weights, a ReLU and a grid."""
        name = f"w{len(self.nodes)}"
        self.constants |= {name: weight, f"{name}s": np.full(len(weight), STEP)}
        decoded = helper.make_node("DequantizeLinear", [name, f"{name}s"], [f"{name}f"], axis=0)
        self.nodes.append(decoded)
        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node("Conv", [self.at, f"{name}f"], [out], **attributes))
        self.at = out
        return self.op("Relu").grid("y")

    def runner(self) -> Callable[[], Array]:
        """The loaded file on random images."""
        graph = helper.make_graph(
            self.nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, self.shape)],
            [helper.make_tensor_value_info(self.at, TensorProto.FLOAT, None)],
            [numpy_helper.from_array(v, k) for k, v in self.constants.items()],
        )
        opset = [helper.make_opsetid("", 21)]
        model: onnx.ModelProto = helper.make_model(graph, opset_imports=opset, ir_version=10)
        loaded = runtime.session(model.SerializeToString())
        feeds = runtime.noise(loaded, 1)
        return lambda: np.asarray(loaded.run(None, feeds)[0])


def compare(row: str, forms: dict[str, Net], rounds: int, *, equal: bool = True) -> None:
    """Measure forms in turns and print their least times."""
    runners = [net.runner() for net in forms.values()]
    answers = [runner() for runner in runners]
    if equal and not all(np.array_equal(answers[0], a) for a in answers):
        raise SystemExit(f"{row}: the forms differ")
    times = 1e6 * interleave(runners, runs=rounds, clock=time.thread_time).min(axis=1)
    told = ", ".join(f"{name} {us:,.0f}" for name, us in zip(forms, times, strict=True))
    print(f"{row}: {told}", flush=True)


def stem(outputs: int, kernel: int, side: int = 224) -> dict[str, Net]:
    """A strided first convolution as it is, with a fourth channel of zeros, and on blocks."""
    rng, pad = np.random.default_rng(0), kernel // 2
    weight = rng.integers(-127, 128, (outputs, 3, kernel, kernel)).astype(np.int8)
    shape, axis = (1, 3, side, side), Axis.of(side, kernel, pad, pad)
    assert axis is not None
    padded = np.pad(weight, ((0, 0), (0, 1), (0, 0), (0, 0)))
    extra = np.array([0, 0, 0, 0, 0, 1, 0, 0], np.int64)
    pads = [axis.front, axis.front, axis.end, axis.end]
    strided = {"strides": [2, 2], "pads": [pad] * 4}
    return {
        "as it is": Net(shape, 114).grid().conv(weight, **strided),
        "4 channels": Net(shape, 114).op("Pad", extra).grid().conv(padded, **strided),
        "blocks": Net(shape, 114)
        .op("SpaceToDepth", blocksize=2)
        .grid()
        .conv(spread(weight, axis, axis), pads=pads),
    }


def grouped(channels: int, groups: int, side: int, merges: tuple[int, ...]) -> dict[str, Net]:
    """Three grouped 3x3 convolutions, groups merged by several factors."""
    width, forms = channels // groups, {}
    for merge in merges:
        rng, net = np.random.default_rng(0), Net((1, channels, side, side)).grid()
        for _ in range(3):
            narrow = rng.integers(-127, 128, (channels, width, 3, 3)).astype(np.int8)
            weight = np.zeros((channels, width * merge, 3, 3), np.int8)
            for o in range(channels):
                start = (o // width) % merge * width
                weight[o, start : start + width] = narrow[o]
            net.conv(weight, pads=[1] * 4, group=groups // merge)
        forms[f"by {merge}"] = net
    return forms


def chain(zero: int, dtype: type) -> Net:
    """Three dense 3x3 convolutions of 64 channels."""
    rng, net = np.random.default_rng(0), Net((1, 64, 56, 56), zero, dtype).grid()
    for _ in range(3):
        net.conv(rng.integers(-127, 128, (64, 64, 3, 3)).astype(np.int8), pads=[1] * 4)
    return net


def gate(integer: bool) -> Net:
    """A SiLU between two pointwise convolutions: gate and product on a grid, or in float."""
    rng = np.random.default_rng(0)
    first, last = (rng.integers(-127, 128, (96, 96, 1, 1)).astype(np.int8) for _ in range(2))
    net = Net((1, 96, 56, 56)).grid().conv(first)
    before = net.at
    net.op("Sigmoid")
    if integer:
        net.grid()
    return net.with_names("Mul", before).grid().conv(last)


def transposed(
    channels: int, outputs: int, kernel: int, padding: int, side: int, groups: int = 1
) -> dict[str, Net]:
    """A transposed convolution of stride 2 between two pointwise ones: in float, as integers."""
    rng = np.random.default_rng(0)
    shape = (channels, outputs // groups, kernel, kernel)
    weight = rng.integers(-127, 128, shape).astype(np.int8)
    axes = subpixel.axes_of((kernel,) * 2, (2, 2), (padding,) * 2, (0, 0), (1, 1))
    parts = [subpixel.kernels(p, axes) for p in torch.from_numpy(weight).chunk(groups)]
    start, end = axes[0].start, axes[0].start + axes[0].length(side)
    crop = [np.array([n, n], np.int64) for n in (start, end)] + [np.array([2, 3])]
    first = rng.integers(-127, 128, (channels, channels, 1, 1)).astype(np.int8)
    last = rng.integers(-127, 128, (outputs, outputs, 1, 1)).astype(np.int8)
    window = {"pads": [padding] * 4, "strides": [2, 2], "group": groups}

    def begin() -> Net:
        return Net((1, channels, side, side)).grid().conv(first)

    island = begin().op("ConvTranspose", STEP * weight, **window).op("Max", np.float32(0))
    whole = begin().conv(torch.cat(parts).numpy(), pads=[axes[0].padding] * 4, group=groups)
    whole.nodes.pop()
    whole.at = whole.nodes[-1].output[0]
    whole.op("DepthToSpace", blocksize=2, mode="CRD").op("Slice", *crop)
    whole.with_names("DequantizeLinear", "s", "y")
    return {"float": island.grid("y").conv(last), "integers": whole.conv(last)}


def main() -> None:
    """Print a line per comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    for outputs, kernel in ((64, 7), (32, 3), (16, 3)):
        compare(f"stem {kernel}x{kernel}, {outputs} outputs", stem(outputs, kernel), rounds)
    for channels, groups, side, merges in (
        (48, 6, 56, (1, 2, 3, 6)),
        (104, 13, 28, (1, 13)),
        (208, 26, 14, (1, 2, 13)),
        (440, 55, 7, (1, 5, 11)),
        (128, 32, 56, (1, 4, 8, 16)),
        (256, 32, 28, (1, 2, 4, 8)),
    ):
        row = f"3 grouped 3x3, {channels} channels in {groups} groups at {side}"
        compare(row, grouped(channels, groups, side, merges), rounds // 4)
    signs = {"uint8": chain(0, np.uint8), "int8": chain(-128, np.int8)}
    compare("3 dense 3x3, 64 channels at 56", signs, rounds)
    gates = {"float island": gate(False), "integers": gate(True)}
    compare("SiLU between 1x1, 96 channels at 56", gates, rounds, equal=False)
    for channels, outputs, kernel, padding, side, groups in (
        (64, 32, 2, 0, 32, 1),
        (128, 64, 2, 0, 56, 1),
        (32, 16, 2, 0, 112, 1),
        (64, 64, 4, 1, 32, 1),
        (256, 256, 4, 1, 16, 1),
        (64, 64, 4, 1, 32, 4),
        (64, 64, 2, 0, 32, 2),
        (64, 64, 4, 1, 32, 64),
    ):
        row = f"transposed {kernel}x{kernel}, {channels} to {outputs} at {side}, {groups} groups"
        forms = transposed(channels, outputs, kernel, padding, side, groups)
        compare(row, forms, rounds // 2, equal=False)


if __name__ == "__main__":
    main()
