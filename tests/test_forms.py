"""Storage forms, on this onnxruntime and on older ones in environments of their own."""

from __future__ import annotations

import importlib.util
from collections import Counter
from functools import cache
from pathlib import Path
from types import ModuleType

import nets
import numpy as np
import onnx
import pytest
import torch

from mpq.errors import UsageError
from mpq.export import runtime, to_onnx
from mpq.export.certify import certify
from mpq.export.form import INT2_CAST, NEEDS, OLDEST, Form, choose_form
from mpq.graph.ir import QuantGraph
from mpq.graph.passes import freeze, prepare, to_float
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate, quantize_layers
from mpq.spec import ROUNDED_16, weight_spec

INTEGER = {"QLinearConv", "QGemm", "MatMulIntegerToFloat"}
CASES = {  # widths of the layers, in turn; options of the export; first runtime that takes it
    "bytes": ((8,), {}, (1, 18)),
    "cast": ((4, 8), {"int4_format": "cast"}, (1, 23)),
    "unpack": ((4, 8), {"int4_format": "unpack"}, (1, 18)),
    "odd": ((3, 5, 6, 2), {"min_runtime": "1.18"}, (1, 18)),
    "wide": ((16,), {"min_runtime": "1.18"}, (1, 18)),
    "rounded": ((16,), {"min_runtime": "1.18"}, (1, 18)),
    "int2": ((2, 8), {"min_runtime": "1.26"}, (1, 26)),
    "dq": ((4,), {"int4_format": "dq"}, (1, 20)),
}
PAIRS = [("residual", case) for case in CASES] + [("attention", c) for c in ("unpack", "dq")]
FLOAT = ("dq", "wide", "rounded")


def runtimes() -> ModuleType:
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "runtimes.py"
    spec = importlib.util.spec_from_file_location("runtimes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNTIMES = runtimes()


@cache
def quantized(
    net: str, widths: tuple[int, ...], *, rounded: bool = False
) -> tuple[QuantGraph, Policy]:
    graph = to_float(nets.build(net), nets.images())
    policy = Policy(
        layers=[
            LayerPolicy(name=name, weight=weight_spec(widths[i % len(widths)]))
            for i, name in enumerate(graph.layers)
        ]
    )
    if rounded:
        default = policy.default.replace(activation=ROUNDED_16)
        policy = policy.replace(default=default)
    prepared = prepare(graph, policy)
    calibrate(prepared, nets.images(16), method="minmax")
    quantize_layers(prepared, nets.images(16), learn_rounding=False, correct_bias=False)
    return freeze(prepared), policy


@pytest.mark.parametrize(("net", "case"), PAIRS)
def test_every_form_answers_alike_here_and_in_the_oldest_runtime_it_names(
    net: str, case: str, tmp_path: Path
):
    widths, options, needs = CASES[case]
    graph, _ = quantized(net, widths, rounded=case == "rounded")
    batch = nets.images(8, seed=3)
    path = tmp_path / "m.onnx"
    result = to_onnx(graph, path, images=batch, **options)
    assert result.certificate.needs == f"onnxruntime>={needs[0]}.{needs[1]}"
    assert not result.certificate.broken()
    onnx.checker.check_model(str(path), full_check=True)
    executed = {row.executed for row in result.certificate.layers}
    assert executed <= INTEGER if case not in FLOAT else not executed & INTEGER
    here = runtime.run(runtime.session(path), batch.numpy())
    with torch.no_grad():
        np.testing.assert_allclose(here, graph.module(batch).numpy(), atol=1e-5)
    for version in RUNTIMES.installed():
        if tuple(map(int, version.split(".")[:2])) < needs:
            with pytest.raises(RuntimeError):  # what the file says it needs, it does need
                RUNTIMES.run_in(version, path, batch.numpy())
            continue
        answer, operators = RUNTIMES.run_in(version, path, batch.numpy())
        if case == "rounded":
            assert operators["QuantizeLinear"] == len(graph.sites)
        np.testing.assert_allclose(answer, here, atol=1e-6)
        kernels = Counter({op: n for op, n in operators.items() if op in INTEGER})
        assert sum(kernels.values()) == sum(row.integer for row in result.certificate.layers)


def test_old_runtimes_are_there():
    if not RUNTIMES.installed():
        pytest.skip("no old onnxruntime here; benchmarks/runtimes.py makes environments of some")
    assert "1.18.1" in RUNTIMES.installed()


def test_how_a_form_is_chosen():
    assert choose_form({8, 4}) == Form()
    assert choose_form({4}, min_runtime="1.23") == Form()
    assert choose_form({8, 4}, min_runtime="1.22.1").int4 == "unpack"
    old = choose_form({8, 4, 2}, min_runtime="1.18")
    assert (old.opset, old.ir, old.int2, old.needs) == (18, 8, False, OLDEST)
    assert not choose_form({2}).int2
    new = choose_form({2, 4}, min_runtime="1.30")
    assert (new.int4, new.int2, new.opset, new.needs) == ("cast", True, 25, INT2_CAST)
    assert choose_form({8}).needs == OLDEST
    rounds = choose_form({4, 16}, min_runtime="1.18", rounds_16=True)
    assert (rounds.int4, rounds.opset, rounds.ir, rounds.needs) == ("unpack", 21, 10, OLDEST)
    assert rounds.metadata()["mpq.int4"] == "unpack"
    assert "mpq.int4" not in old.metadata()
    assert Form("dq").metadata()["mpq.int4"] == "dq"
    assert Form().metadata() == {NEEDS: "onnxruntime>=1.23"}


def test_forms_that_cannot_be():
    with pytest.raises(UsageError, match=r"--min-runtime must be at least 1\.18\. Got 1\.14"):
        choose_form({8}, min_runtime="1.14")
    with pytest.raises(
        UsageError, match=r"must be a version of onnxruntime such as 1\.18\. Got 'n"
    ):
        choose_form({8}, min_runtime="new")
    with pytest.raises(UsageError, match=r"cast needs onnxruntime 1\.23 or newer, but --min-runt"):
        choose_form({4}, int4_format="cast", min_runtime="1.20")


def test_the_form_dq_is_certified_for_what_it_is(tmp_path: Path):
    graph, _ = quantized("residual", (4,))
    path = to_onnx(graph, tmp_path / "m.onnx", int4_format="dq").path
    rows = certify(path).layers
    assert {row.stored for row in rows} == {"INT4"}
    assert not any(row.integer or row.broken for row in rows)
    assert all("for other runtimes, as --int4-format dq asks" in row.reason for row in rows)
