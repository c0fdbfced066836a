"""Profiles of a small network and `mpq profile`. No time is compared with another time."""

from __future__ import annotations

import json
import subprocess
import sys

import nets
import onnx
import pytest
import torch

import mpq
from mpq.cli import main
from mpq.errors import PolicyError
from mpq.export import profile as measuring
from mpq.export import runtime, to_onnx
from mpq.export.certify import executed_nodes
from mpq.export.profile import edges, profile
from mpq.latency import LatencyProfile
from mpq.pipeline import profiling
from mpq.pipeline.profiling import check, profile_module

SIZE = (3, 16, 16)


@pytest.fixture(scope="module")
def graph() -> mpq.QuantGraph:
    return mpq.to_float(nets.build("residual"), nets.images(2))


@pytest.fixture(scope="module")
def found(graph: mpq.QuantGraph) -> LatencyProfile:
    return profile(graph, runs=5)


def test_every_layer_is_measured_both_ways(graph, found) -> None:
    assert list(found.layers) == list(graph.layers)
    assert all(c.integer_ms > 0 and c.float_ms > 0 for c in found.layers.values())
    assert found.runtime == f"onnxruntime {runtime.version()}"
    assert (found.threads, found.batch) == (1, 1)
    assert set(found.boundary_ms) == set(edges(graph))
    integer = found.predict(dict.fromkeys(graph.layers, True))
    parts = found.base_ms + sum(c.integer_ms for c in found.layers.values())
    assert integer == pytest.approx(parts)


def test_edges_follow_the_data(graph) -> None:
    names = list(graph.layers)
    pairs = edges(graph)
    assert len(pairs) == len(names) - 1
    assert {b for _, b in pairs} == set(names[1:])
    assert all(names.index(a) < names.index(b) for a, b in pairs)


def test_nodes_are_charged_to_the_layer_before_them(graph) -> None:
    data = measuring.at_8_bits(graph, ())
    optimized = runtime.optimized_model(data)
    executed = executed_nodes(data, optimized)
    assert set(executed) == set(graph.layers)
    nodes = optimized.graph.node
    assert {nodes[i].op_type for i in executed.values()} == {"QLinearConv", "QGemm"}
    owners = measuring.charged_to(optimized.graph, executed)
    assert len(owners) == len(nodes)
    assert owners[0] == next(iter(graph.layers))  # the input's quantizer
    adds = [i for i, n in enumerate(nodes) if n.op_type == "QLinearAdd"]
    assert adds
    for i in adds:
        before = max(index for index in executed.values() if index < i)
        assert executed[owners[i]] == before


def test_boundaries_are_what_the_mixed_files_take_beyond_their_layers() -> None:
    layers = {n: measuring.LayerLatency(1.0, 3.0) for n in "abc"}
    elements = {("a", "b"): 100, ("b", "c"): 300}
    mixed = [(["b"], 0.5 + 1 + 3 + 1 + 0.8), (["a", "c"], 0.5 + 3 + 1 + 3 + 0.8)]
    rate = measuring.boundary_rate(layers, elements, 0.5, mixed)
    assert rate == pytest.approx(0.8 / 400)
    fast = [(names, ms - 2) for names, ms in mixed]
    assert measuring.boundary_rate(layers, elements, 0.5, fast) == 0


def test_node_times_are_scaled_to_the_whole() -> None:
    base, scaled = measuring.scaled_to([{"a": 1.0, "b": 3.0}, {"a": 5.0, "b": 5.0}], [4.5, 10.0])
    assert base == 0
    assert scaled[0] == pytest.approx({"a": 1.125, "b": 3.375})
    assert sum(scaled[1].values()) == pytest.approx(10.0)


def test_a_profile_is_measured_once(monkeypatch, tmp_path, found) -> None:
    calls = []
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path))
    monkeypatch.setattr(profiling, "profile", lambda *a, **k: calls.append(k) or found)
    net = nets.build("residual")
    assert profile_module(net, SIZE) == profile_module(net, SIZE) == found
    assert len(calls) == 1
    profile_module(nets.build("residual", seed=1), SIZE)  # other weights, the same times
    assert len(calls) == 1
    profile_module(net, SIZE, batch=2)
    profile_module(net, (3, 32, 32))
    profile_module(net, SIZE, again=True)
    assert len(calls) == 4
    monkeypatch.setattr(profiling, "cpu_identity", lambda: "another CPU")
    profile_module(net, SIZE)
    assert len(calls) == 5
    next(tmp_path.glob("profile-*.json")).write_text("damaged")
    for _ in range(2):
        profile_module(net, SIZE)
        profile_module(net, SIZE, batch=2)
    assert len(calls) <= 7


def test_a_file_is_held_against_its_prediction(graph, found, tmp_path) -> None:
    policy = mpq.Policy.uniform(8)
    path = to_onnx(mpq.prepare(graph, policy), tmp_path / "m.onnx").path
    result = check(found, path)
    assert result.measured_ms > 0
    assert result.predicted_ms == found.predict(dict.fromkeys(graph.layers, True))
    assert result.error == pytest.approx(100 * (result.predicted_ms / result.measured_ms - 1))
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(PolicyError, match="must be a file of mpq, with its policy inside"):
        check(found, path)


def test_the_command_writes_what_analyze_reads(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "RUNS", 5)
    torch.save(nets.build("plain").state_dict(), "plain.pth")
    monkeypatch.syspath_prepend(tmp_path)
    text = "from nets import Plain\ndef plain(): return Plain()\nplain.input_size = (3, 16, 16)\n"
    (tmp_path / "small_nets.py").write_text(text)
    tell = ["profile", "plain.pth", "--model", "small_nets:plain"]
    assert main([*tell, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kept = LatencyProfile.load(tmp_path / "runs" / "plain" / "profile.json")
    assert list(told["layers"]) == list(kept.layers)
    assert main(tell) == 0  # the same once more: nothing is lost
    assert "all integer" in " ".join(capsys.readouterr().out.split())
    before = (tmp_path / "runs" / "plain" / "profile.json").read_bytes()
    other = [*tell, "--batch", "2"]
    refused = "profile.json exists already. Replace it with --force"
    assert main(other) == 2  # before it is measured
    assert refused in " ".join(capsys.readouterr().err.split())
    assert main([*other, "-o", "two"]) == 0
    assert main(other) == 2  # and where it was measured for another run
    assert refused in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "runs" / "plain" / "profile.json").read_bytes() == before
    assert main([*other, "--force"]) == 0
    assert LatencyProfile.load(tmp_path / "runs" / "plain" / "profile.json").batch == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.pth"], "nowhere.pth"),
        (["nowhere.pth", "--threads", "0"], "0 is not in the range x>=1"),
        (["nowhere.pth", "-o", "x.json"], "-o must name a run folder"),
    ],
)
def test_bad_input_is_told(argv, message, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["profile", *argv]) == 2
    assert message in capsys.readouterr().err


def test_the_help_does_not_load_torch() -> None:
    code = (
        "import sys; from mpq.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == 0
