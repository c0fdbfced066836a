"""`mpq certify` on a file of ours and on a float file of anybody's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nets import build, images

import mpq
from mpq.cli import main
from mpq.export import float_to_onnx, to_onnx


@pytest.fixture
def graph() -> mpq.QuantGraph:
    return mpq.to_float(build("plain"), images(8))


def test_certify_reads_the_policy_inside(
    graph: mpq.QuantGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = mpq.Policy.uniform(4, 8)
    quantized = mpq.quantize_graph(mpq.prepare(graph, policy), images(8))
    to_onnx(quantized, tmp_path / "m.onnx")
    assert main(["certify", str(tmp_path / "m.onnx"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["integer_macs_fraction"] == 1.0
    assert {(row["asked"], row["stored"]) for row in told["layers"]} == {("W4A8", "INT4")}


def test_certify_takes_files_of_anybody(
    graph: mpq.QuantGraph, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    float_to_onnx(graph, tmp_path / "f.onnx")
    assert main(["certify", str(tmp_path / "f.onnx")]) == 0
    assert "0.0% of the MACs run as integers" in capsys.readouterr().out


def test_certify_says_that_a_file_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certify", "nowhere.onnx"]) == 2
    assert "nowhere.onnx does not exist" in capsys.readouterr().err
