"""A file judged for a CPU that is not here, by the integer reference of that CPU."""

from __future__ import annotations

import json
from pathlib import Path

import nets
import numpy as np
import pytest

import mpq
from mpq.errors import ExportError
from mpq.export import judges, runtime, to_onnx
from mpq.export.arithmetic import ARITHMETIC
from mpq.export.onnx_file import verify_file
from mpq.export.reference import Reference
from mpq.policy import Policy
from mpq.ptq import calibrate
from mpq.targets import ONNXRUNTIME_AVX2, ONNXRUNTIME_CPU, get_target


def quantized(net: str = "residual", target: str | None = None) -> mpq.graph.ir.QuantGraph:
    policy = Policy.uniform(8) if target is None else Policy(target=target)
    graph = mpq.prepare(nets.build(net), policy, nets.images())
    calibrate(graph, nets.images(16), method="minmax")
    return graph


@pytest.mark.parametrize("net", ["residual", "se_sigmoid", "attention", "gated"])
def test_the_reference_of_this_cpu_is_the_runtime(net: str, tmp_path: Path):
    path = to_onnx(quantized(net), tmp_path / "m.onnx").path
    images = nets.images(40, seed=2).numpy()
    here = runtime.run(runtime.session(path), images, batch=32)
    kind = judges.this_target().arithmetic
    assert kind is not None
    (there,) = Reference(kind).answers(path.read_bytes(), images).values()
    if net == "residual":
        np.testing.assert_array_equal(there, here)
    np.testing.assert_allclose(there, here, atol=1e-4)


def test_a_file_for_cpus_that_are_not_here_is_proven(tmp_path: Path):
    graph = quantized(target="onnxruntime-arm64,onnxruntime-wasm")
    result = to_onnx(graph, tmp_path / "m.onnx", images=nets.images(20))
    report = result.verification
    assert report is not None
    told = json.loads(report.to_json())
    rows = [told, *told["elsewhere"]]
    assert [row["target"] for row in rows] == ["onnxruntime-arm64", "onnxruntime-wasm"]
    assert {row["judged_by"] for row in rows} == {"reference"}
    assert {row["top1_agreement"] for row in rows} == {1.0}
    assert all(len(row["layers"]) == len(graph.sites) for row in rows)


def test_the_runtime_judges_what_it_can(tmp_path: Path):
    graph = quantized(target=f"{judges.this_target().name},arm64,openvino")
    report = to_onnx(graph, tmp_path / "m.onnx", images=nets.images(20)).verification
    assert report is not None
    assert (report.target, report.judged_by) == (judges.this_target().name, "runtime")
    assert [r.judged_by for r in report.elsewhere] == ["reference"]
    again = verify_file(graph, tmp_path / "m.onnx", nets.images(20), "wasm")
    assert (again.target, again.judged_by) == ("onnxruntime-wasm", "reference")
    assert not again.elsewhere


def test_without_vnni_the_reference_judges_a_file_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(judges, "this_target", lambda: ONNXRUNTIME_AVX2)
    assert not judges.runtime_judges(ONNXRUNTIME_CPU)
    assert judges.runtime_judges(ONNXRUNTIME_AVX2)
    monkeypatch.setattr(judges, "this_target", lambda: ONNXRUNTIME_CPU)
    assert judges.runtime_judges(ONNXRUNTIME_AVX2)
    assert not judges.runtime_judges(get_target("arm64"))


def test_a_file_for_vnni_is_proven_on_a_cpu_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    graph = quantized(target="onnxruntime-cpu")
    right = judges.Reference.answers
    monkeypatch.setattr(judges, "this_target", lambda: ONNXRUNTIME_AVX2)
    seen = []
    monkeypatch.setattr(
        judges.Reference, "answers", lambda *a, **k: seen.append(a) or right(*a, **k)
    )
    report = to_onnx(graph, tmp_path / "m.onnx", images=nets.images(20)).verification
    assert report is not None
    assert (report.target, report.judged_by) == ("onnxruntime-cpu", "reference")
    assert len(seen) == 1


def test_a_cpu_that_answers_otherwise_fails_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    right = ARITHMETIC["arm64"]["QLinearConv"]
    monkeypatch.setitem(ARITHMETIC["arm64"], "QLinearConv", lambda i, a: right(i, a) ^ 64)
    graph = quantized(target=f"{judges.this_target().name},arm64")
    with pytest.raises(ExportError, match=r"onnxruntime-arm64: .*steps off by itself"):
        to_onnx(graph, tmp_path / "m.onnx", images=nets.images(20))
    assert not list(tmp_path.iterdir())


def test_fewer_images_where_the_reference_would_take_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(judges, "MACS", 1.0)
    graph = quantized(target="arm64")
    report = to_onnx(graph, tmp_path / "m.onnx", images=nets.images(40)).verification
    assert report is not None
    assert report.n == judges.LEAST
