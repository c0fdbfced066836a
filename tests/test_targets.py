"""Targets by where a file runs: names, several at once, and what a file for them looks like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nets
import onnx
import pytest

import mpq
from mpq.cli import main
from mpq.cpu import Cpu
from mpq.errors import PolicyError, UsageError
from mpq.export import to_onnx
from mpq.export.certify import certify
from mpq.layers import LayerChoice
from mpq.policy import LayerPolicy, Policy
from mpq.ptq import calibrate
from mpq.spec import weight_spec
from mpq.targets import TARGETS, each, get_target, this_target, together

EVERYWHERE = "onnxruntime-cpu,onnxruntime-arm64,onnxruntime-wasm,openvino-cpu"


def quantized(policy: Policy) -> mpq.graph.ir.QuantGraph:
    graph = mpq.prepare(nets.build("residual"), policy, nets.images())
    calibrate(graph, nets.images(8), method="minmax")
    return graph


def mixed(target: str) -> Policy:
    names = mpq.to_float(nets.build("residual"), nets.images()).layers
    narrow = LayerPolicy(name=list(names)[1], weight=weight_spec(4))
    return Policy(target=target, layers=[narrow])


def test_short_names_and_several_at_once():
    assert get_target("arm64") is TARGETS["onnxruntime-arm64"]
    assert get_target("openvino, wasm,onnxruntime-cpu,arm64,wasm").name == EVERYWHERE
    assert [t.name for t in each(get_target("wasm,avx2"))] == [
        "onnxruntime-cpu-avx2",
        "onnxruntime-wasm",
    ]
    assert each(get_target("wasm")) == (get_target("wasm"),)
    with pytest.raises(PolicyError, match=r"Got 'arm'; did you mean .*arm64"):
        get_target("wasm,arm")


def test_several_targets_ask_what_each_of_them_asks():
    both = get_target("avx2,openvino")
    assert both.saturates
    assert both.widths == (4, 8, 16)
    assert both.int4_formats == {"cast"}
    assert both.arithmetic is None
    assert get_target("avx2,onnxruntime-cpu").arithmetic == "x86"
    eight = both.take(LayerChoice.at("a", 8, 8)).weight
    assert eight is not None
    assert eight.reduced
    with pytest.raises(PolicyError, match=r"target onnxruntime-cpu-avx2,openvino-cpu has no W3A8"):
        both.support(LayerChoice.at("a", 3, 8))


def test_targets_without_anything_in_common_are_named():
    packed = replace(TARGETS["onnxruntime-arm64"], name="old", int4_formats=frozenset({"unpack"}))
    with pytest.raises(
        PolicyError,
        match=r"storage of 4-bit weights in common. Got old: unpack; openvino-cpu: cast",
    ):
        together([TARGETS["onnxruntime-wasm"], packed, TARGETS["openvino-cpu"]])
    three = replace(packed, widths=(3,))
    with pytest.raises(PolicyError, match=r"width in common. Got openvino-cpu: 4, 8, 16; old: 3"):
        together([TARGETS["openvino-cpu"], three])


@pytest.mark.parametrize(
    ("cpu", "name"),
    [
        (Cpu("Cortex-A76", frozenset({"asimddp"}), False, True), "onnxruntime-arm64"),
        (Cpu("Xeon", frozenset({"avx512_vnni"}), True), "onnxruntime-cpu"),
        (Cpu("Core", frozenset({"avx2"}), True), "onnxruntime-cpu-avx2"),
        (Cpu("riscv64", frozenset(), False), "onnxruntime-cpu"),
    ],
)
def test_the_computer_at_hand(cpu: Cpu, name: str):
    assert this_target(cpu).name == name


def test_one_file_for_several(tmp_path: Path):
    graph = quantized(mixed(EVERYWHERE))
    result = to_onnx(graph, tmp_path / "m.onnx", images=nets.images(8))
    assert result.certificate.target == EVERYWHERE
    assert {row.stored for row in result.certificate.layers} == {"INT8", "INT4"}
    assert all(row.integer for row in result.certificate.layers)
    assert not certify(tmp_path / "m.onnx", target="arm64,openvino").broken()
    same = quantized(mixed("onnxruntime-cpu"))
    one, other = onnx.load(result.path), onnx.load(to_onnx(same, tmp_path / "one.onnx").path)
    assert one.graph == other.graph


def test_a_storage_that_a_target_decodes_in_float_is_refused(tmp_path: Path):
    graph = quantized(mixed("onnxruntime-cpu,openvino-cpu"))
    with pytest.raises(
        UsageError, match=r"openvino-cpu needs .* form cast, but --min-runtime 1.18 asks for unpack"
    ):
        to_onnx(graph, tmp_path / "m.onnx", min_runtime="1.18")
    with pytest.raises(UsageError, match=r"form cast, but --int4-format asks for dq"):
        to_onnx(graph, tmp_path / "m.onnx", int4_format="dq")
    assert not list(tmp_path.iterdir())
    to_onnx(graph, tmp_path / "m.onnx", min_runtime="1.18", target="arm64,wasm")


def test_no_folder_travels_in_a_file(tmp_path: Path):
    info = {"arch": "net", "classes": 10, "checkpoint": "../private/who/net.pth"}
    graph = quantized(mixed("onnxruntime-cpu").replace(model=info))
    path = to_onnx(graph, tmp_path / "m.onnx").path
    assert b"private" not in path.read_bytes()
    told = json.loads({p.key: p.value for p in onnx.load(path).metadata_props}["mpq"])
    assert told["policy"]["model"]["checkpoint"] == "net.pth"


def test_the_list(capsys: pytest.CaptureFixture[str]):
    assert main(["targets", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["target"] for row in rows] == list(TARGETS)
    assert {row["proven"] for row in rows} == {"reference", "runtime"}
    assert main(["targets"]) == 0
    assert this_target().name in capsys.readouterr().out


def test_an_unknown_target_of_a_command(capsys: pytest.CaptureFixture[str]):
    assert main(["certify", "m.onnx", "--target", "arm46"]) == 2
    told = capsys.readouterr().err
    assert "target must be one of" in told
    assert "did you mean" in told
