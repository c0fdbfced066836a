"""Record what single integer kernels give on each architecture: the fixture of the tests.

`python benchmarks/record_kernels.py` runs every kernel of `mpq.export.kernels` on integers of a
fixed seed in onnxruntime on x86, on ARM (emulated) and in WebAssembly (node), which
`mpq portability --install arm64` and `web` install, and writes tests/recorded/kernels.npz. Of
QLinearAdd and QLinearMul all 65,536 pairs are run for many scales, and those pairs are kept on
which the runtimes disagree, with some others; scales that are powers of two make ties.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from mpq.export.foreign import Foreign, Job, chosen, run

OUT = Path(__file__).resolve().parent.parent / "tests" / "recorded" / "kernels.npz"
RUNTIMES = {
    "x86": "onnxruntime",
    "arm64": "onnxruntime-arm64 cortex-a53",
    "wasm": "onnxruntime-web",
}
CONTRIB = "com.microsoft"
STANDARD = ("QLinearMatMul", "DynamicQuantizeLinear", "QuantizeLinear", "MaxPool")
PAIRS = 24
"""Of those on which all agree; four times as many at most of the others."""
F32 = np.float32
Array = NDArray[Any]


@dataclass
class Case:
    """One kernel on some integers."""

    op: str
    inputs: list[Array]
    attributes: dict[str, Any] = field(default_factory=dict)
    floats: bool = False


class Maker:
    """Random operands of kernels, of a fixed seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def bytes(self, *shape: int) -> Array:
        """Unsigned integers."""
        return self.rng.integers(0, 256, shape, np.uint8)

    def signed(self, *shape: int) -> Array:
        """Weights."""
        return self.rng.integers(-127, 128, shape).astype(np.int8)

    def scale(self, power: bool) -> Array:
        """A scale, a power of two for ties."""
        return np.asarray(
            2.0 ** -self.rng.integers(3, 7) if power else self.rng.uniform(0.003, 0.2), F32
        )

    def grid(self, power: bool) -> list[Array]:
        """A scale and a zero point."""
        return [self.scale(power), self.bytes().reshape(())]


def pairs(make: Maker) -> dict[str, Case]:
    """Additions and products of all pairs of integers."""
    a = np.repeat(np.arange(256, dtype=np.uint8), 256)
    b = np.tile(np.arange(256, dtype=np.uint8), 256)
    found = {}
    for i in range(80):
        for op in ("QLinearAdd", "QLinearMul")[i >= 24 :]:  # products differ one time in a million
            grids = [make.grid(i % 2 == 1) for _ in range(3)]
            if 20 <= i < 24:  # ratios that no fixed point holds
                grids[1][0] = np.asarray(grids[2][0] * F32(2.0**-15), F32)
            found[f"{op}.{i}"] = Case(op, [a, *grids[0], b, *grids[1], *grids[2]])
    return found


def others(make: Maker) -> dict[str, Case]:
    """The kernels that are the same everywhere, and the products that end in floats."""
    found = {}
    for i in range(4):
        power = i % 2 == 1
        g = lambda: make.grid(power)  # noqa: E731, B023
        last, pads = {"channels_last": i // 2}, [i // 2] * 4
        shape = (1, 5, 6, 8) if i // 2 else (1, 8, 5, 6)
        pool = {"kernel_shape": [2 + i // 2] * 2, "strides": [2, 2], "pads": pads}
        found[f"global.{i}"] = Case(
            "QLinearGlobalAveragePool", [make.bytes(*shape), *g(), *g()], last
        )
        found[f"average.{i}"] = Case(
            "QLinearAveragePool", [make.bytes(*shape), *g(), *g()], {**pool, **last}
        )
        found[f"max.{i}"] = Case("MaxPool", [make.bytes(1, 4, 7, 7)], pool)
        line = np.arange(256, dtype=np.uint8)
        found[f"concat.{i}"] = Case(
            "QLinearConcat", [*g(), line, *g(), line[::-1].copy(), *g()], {"axis": 0}
        )
        found[f"sigmoid.{i}"] = Case(
            "QLinearSigmoid", [line, *g(), np.asarray(1 / 256, F32), np.asarray(0, np.uint8)]
        )
        a, w, zeros = make.bytes(5, 70 + i), make.signed(70 + i, 33), np.zeros(33, np.int8)
        ws = make.rng.uniform(0.001, 0.02, 33).astype(F32)
        bias, floats = (
            make.rng.integers(-3000, 3000, 33).astype(np.int32),
            make.rng.standard_normal(33).astype(F32),
        )
        s, z = g()
        found[f"gemm.{i}"] = Case("QGemm", [a, s, z, w, ws, zeros, bias, *g()])
        found[f"gemm_float.{i}"] = Case("QGemm", [a, s, z, w, ws, zeros, bias], floats=True)
        found[f"matmul.{i}"] = Case(
            "QLinearMatMul", [a, s, z, w, ws[0].reshape(()), zeros[0].reshape(()), *g()]
        )
        found[f"matmul_float.{i}"] = Case(
            "MatMulIntegerToFloat", [a, w, s, ws, z, zeros, floats], floats=True
        )
        x = make.rng.standard_normal((6, 70 + i)).astype(F32) * F32(i + 1)
        found[f"dynamic_matmul.{i}"] = Case(
            "DynamicQuantizeMatMul", [x, w, ws, zeros, floats], floats=True
        )
        found[f"dynamic.{i}"] = Case("DynamicQuantizeLinear", [x])
        found[f"quantize.{i}"] = Case("QuantizeLinear", [np.rint(x * 64) / F32(64), *g()])
        group, kernel = (8, 3) if i == 1 else (2, 3) if i == 2 else (1, 1 + 2 * (i % 2))
        kernels, per = make.signed(8, 8 // group, kernel, kernel), ws[:8]
        window = {"kernel_shape": [kernel] * 2, "pads": [kernel // 2] * 4, "group": group}
        operands = [
            make.bytes(*shape),
            *g(),
            kernels,
            per,
            zeros[:8],
            np.asarray(0.25 if power else 0.3, F32),
        ]
        operands += [make.bytes().reshape(()), bias[:8]]
        found[f"conv.{i}"] = Case("QLinearConv", operands, {**window, **(last if i // 2 else {})})
    return found


def model(cases: dict[str, Case]) -> tuple[bytes, dict[str, Array]]:
    """One model with a node for each case, and what it is fed."""
    nodes, constants, given, results, feeds = [], [], [], [], {}
    for name, case in cases.items():
        names = [f"{name}.{i}" for i in range(len(case.inputs))]
        for key, x in zip(names, case.inputs, strict=True):
            if x.ndim and x.dtype != np.int8 and (x.dtype == np.uint8 or key.endswith(".0")):
                given.append(
                    helper.make_tensor_value_info(
                        key, helper.np_dtype_to_tensor_dtype(x.dtype), x.shape
                    )
                )
                feeds[key] = x
            else:
                constants.append(numpy_helper.from_array(x, key))
        outputs = [name, f"{name}.s", f"{name}.z"][: 3 if case.op == "DynamicQuantizeLinear" else 1]
        domain = (
            CONTRIB
            if case.op not in STANDARD
            and not (case.op == "QLinearConv" and not case.attributes.get("channels_last"))
            else ""
        )
        nodes.append(helper.make_node(case.op, names, outputs, domain=domain, **case.attributes))
        kind = TensorProto.FLOAT if case.floats else TensorProto.UINT8
        results.append(helper.make_tensor_value_info(name, kind, None))
    graph = helper.make_graph(nodes, "kernels", given, results, constants)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(CONTRIB, 1)]
    made = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return made.SerializeToString(), feeds


def outputs(there: Foreign, cases: dict[str, Case]) -> dict[str, Array]:
    """What a runtime gives for each case."""
    data, feeds = model(cases)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernels.onnx"
        path.write_bytes(data)
        return run(there, path, Job(feeds, optimize=False)).outputs


def main() -> None:
    """Run all cases in all runtimes; keep what tells."""
    make = Maker(7)
    cases = pairs(make) | others(make)
    there = {kind: chosen((name,))[0] for kind, name in RUNTIMES.items()}
    found = {kind: outputs(runtime, cases) for kind, runtime in there.items()}
    kept: dict[str, Array] = {}
    told: list[list[Any]] = []
    for name, case in cases.items():
        answers = {kind: of[name] for kind, of in found.items()}
        if case.op in ("QLinearAdd", "QLinearMul"):
            apart = np.flatnonzero(np.any([answers["x86"] != x for x in answers.values()], axis=0))
            apart = make.rng.choice(apart, min(len(apart), 4 * PAIRS), replace=False)
            some = np.union1d(apart, make.rng.choice(65536, PAIRS, replace=False))
            case.inputs = [x[some] if x.ndim else x for x in case.inputs]
            answers = {kind: x[some] for kind, x in answers.items()}
        told.append([name, case.op, case.attributes, len(case.inputs)])
        kept |= {f"{name}/{i}": x for i, x in enumerate(case.inputs)}
        kept |= {f"{name}/{kind}": x for kind, x in answers.items()}
    OUT.parent.mkdir(exist_ok=True)
    tensors = [[name, str(x.dtype), x.shape] for name, x in kept.items()]
    index = np.frombuffer(json.dumps({"cases": told, "tensors": tensors}).encode(), np.uint8)
    data = np.frombuffer(b"".join(x.tobytes() for x in kept.values()), np.uint8)
    np.savez_compressed(OUT, index=index, data=data)
    print(f"{OUT}: {len(cases)} cases, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
