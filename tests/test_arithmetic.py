"""The kernels of each architecture against integers that its runtime gave.

tests/recorded/kernels.npz was written by benchmarks/record_kernels.py: onnxruntime on x86, on ARM
under qemu, and onnxruntime-web in node.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mpq.export.arithmetic import ARITHMETIC, kernels_of
from mpq.export.kernels import KERNELS
from mpq.target import Arithmetic
from mpq.targets import TARGETS

RECORDED = Path(__file__).resolve().parent / "recorded" / "kernels.npz"
DIFFERENT = {
    "arm64": {"QLinearAdd", "QLinearMul", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"},
    "wasm": {"QLinearAdd", "QLinearMul"},
}


@cache
def _file() -> tuple[list[Any], dict[str, NDArray[Any]]]:
    with np.load(RECORDED) as file:
        index, data = json.loads(file["index"].tobytes()), file["data"].tobytes()
    tensors, offset = {}, 0
    for name, kind, shape in index["tensors"]:
        x = np.frombuffer(data, kind, int(np.prod(shape)), offset).reshape(shape)
        tensors[name], offset = x, offset + x.nbytes
    return index["cases"], tensors


def recorded() -> dict[str, NDArray[Any]]:
    return _file()[1]


def cases() -> list[tuple[str, str, dict[str, Any], list[NDArray[Any]]]]:
    return [
        (name, op, attributes, [recorded()[f"{name}/{i}"] for i in range(count)])
        for name, op, attributes, count in _file()[0]
    ]


def mismatches(arithmetic: Arithmetic, as_of: Arithmetic) -> dict[str, int]:
    """Values by kernel that the formulas of one architecture give otherwise than another one's."""
    found: dict[str, int] = {}
    for name, op, attributes, inputs in cases():
        result = kernels_of(arithmetic)[op](inputs, attributes)
        want = result[0] if isinstance(result, list) else result
        have = recorded()[f"{name}/{as_of}"]
        assert want.shape == have.shape
        assert want.dtype == have.dtype
        found[op] = found.get(op, 0) + int((want != have).sum())
    return found


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_every_recorded_value_is_predicted(arithmetic: Arithmetic):
    found = mismatches(arithmetic, arithmetic)
    assert set(found.values()) == {0}, found
    without = KERNELS.keys() - found.keys()
    assert without <= {"DequantizeLinear", "NhwcMaxPool"}, "kernels that no record holds"


@pytest.mark.parametrize("arithmetic", DIFFERENT)
def test_what_is_said_to_differ_from_x86_does(arithmetic: Arithmetic):
    found = mismatches("x86", arithmetic)
    assert {op for op, count in found.items() if count} == DIFFERENT[arithmetic]
    changed = {op for op in KERNELS if ARITHMETIC[arithmetic][op] is not KERNELS[op]}
    assert changed == DIFFERENT[arithmetic]


def test_ratios_beyond_fixed_point_are_among_the_records():
    small = [i for _, op, _, i in cases() if op == "QLinearAdd" and i[4] / i[6] < 2.0**-14]
    assert len(small) == 4


def test_every_target_names_an_arithmetic_or_none():
    assert {t.arithmetic for t in TARGETS.values()} == {*ARITHMETIC, None}
