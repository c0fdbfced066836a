from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mpq.data import Normalization, load_arrays, open_data
from mpq.errors import DataError, ExportError, UsageError
from mpq.export import bench as bench_module
from mpq.export import runtime
from mpq.export.bench import Timing, bench, file_bytes, interleave, peak_mb, top1
from mpq.export.fileinfo import file_info
from mpq.export.meta import KEY, to_metadata
from mpq.export.peers import onnxruntime_dynamic, onnxruntime_static
from mpq.policy import DataInfo, ModelInfo, Policy

CLASSES, SIDE = 10, 16


@pytest.fixture(scope="module")
def digits():
    data = open_data("digits")
    train, train_labels = load_arrays(data.train)
    images, labels = load_arrays(data.test)
    return train, train_labels, images, labels


@pytest.fixture(scope="module")
def weights(digits):
    """A nearest-mean classifier over pixels in 0..1: `x @ w + b`."""
    train, labels = digits[0].astype(np.float64) / 255, digits[1]
    flat = train.transpose(0, 3, 1, 2).reshape(len(train), -1)
    means = np.stack([flat[labels == c].mean(0) for c in range(CLASSES)])
    w, b = 2 * means.T, -(means**2).sum(1)
    return w.astype(np.float32), b.astype(np.float32)


def write_model(path, weights, *, form="float", batch="n", policy=None, side=SIDE, external=False):
    """A Flatten + Gemm over images; `form`: float, nchw or nhwc (both uint8)."""
    w, b = weights
    nodes, name = [], "x"
    shape = [batch, 3, side, side] if form != "nhwc" else [batch, side, side, 3]
    if form != "float":
        nodes.append(helper.make_node("Cast", [name], ["pixels"], to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Div", ["pixels", "255"], ["scaled"]))
        name = "scaled"
    if form == "nhwc":
        nodes.append(helper.make_node("Transpose", [name], ["planes"], perm=[0, 3, 1, 2]))
        name = "planes"
    nodes.append(helper.make_node("Flatten", [name], ["flat"]))
    nodes.append(helper.make_node("Gemm", ["flat", "w", "b"], ["y"]))
    kind = TensorProto.FLOAT if form == "float" else TensorProto.UINT8
    tensors = {"w": w, "b": b} | ({} if form == "float" else {"255": np.float32(255)})
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, w.shape[1]])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    if policy is not None:
        helper.set_model_props(model, {KEY: policy})
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data")
    return path


def told(normalize):
    """The metadata of a file made for these digits."""
    model = ModelInfo(arch="x", classes=10, input=(3, SIDE, SIDE), normalize=normalize)
    return to_metadata(Policy(model=model, data=DataInfo(name="digits")))


def oracle(weights, images, labels):
    flat = (images.astype(np.float64) / 255).transpose(0, 3, 1, 2).reshape(len(images), -1)
    hits = (flat @ weights[0].astype(np.float64) + weights[1]).argmax(1) == labels
    return 100 * float(hits.mean())


@pytest.mark.parametrize(
    ("form", "batch"), [("float", "n"), ("nchw", "n"), ("nhwc", "n"), ("float", 7), ("nhwc", 1)]
)
def test_top1_is_that_of_numpy_for_every_form_of_input(tmp_path, digits, weights, form, batch):
    path = write_model(tmp_path / "m.onnx", weights, form=form, batch=batch)
    _, _, images, labels = digits
    expected = oracle(weights, images, labels)
    assert 80 < expected < 95  # neither chance nor perfection would tell much
    assert top1(path, images, labels, Normalization.parse("none")) == pytest.approx(expected)


def test_normalization_reaches_the_model(tmp_path, digits, weights):
    path = write_model(tmp_path / "m.onnx", weights)
    _, _, images, labels = digits
    shifted = Normalization((0.9, -0.9, 0.5), (0.1, 3.0, 1.0))
    assert top1(path, images, labels, shifted) < oracle(weights, images, labels)


def test_rows_hold_the_float_model_first_and_what_was_measured(tmp_path, digits, weights):
    _, _, images, labels = digits
    policy = told("none")
    model = write_model(tmp_path / "model.onnx", weights, form="nhwc", policy=policy)
    reference = write_model(tmp_path / "float.onnx", weights, policy=policy)
    rows = bench(
        [model, reference],
        float_file=reference,
        images=images,
        labels=labels,
        timing=Timing(batch=3, runs=20),
    )
    assert [Path(r.file).name for r in rows] == ["float.onnx", "model.onnx"]
    assert [r.bytes for r in rows] == [reference.stat().st_size, model.stat().st_size]
    assert rows[0].top1 == rows[1].top1 == round(oracle(weights, images, labels), 2)
    assert rows[0].ratio_to_float == 1.0
    assert all(r.n == len(images) and r.batch == 3 and r.threads == 1 for r in rows)
    assert all(0 < r.latency_ms.p10 <= r.latency_ms.median <= r.latency_ms.p90 for r in rows)
    line = json.loads(rows[1].to_json())
    assert list(line) == [
        *("file", "bytes", "top1", "n", "latency_ms", "ratio_to_float", "threads", "batch"),
        *("peak_mb", "top1_interval"),
    ]
    assert set(line["latency_ms"]) == {"median", "p10", "p90"}


def test_the_ratio_says_how_many_times_faster(tmp_path):
    rng = np.random.default_rng(0)

    def model(name, classes):
        wide = rng.standard_normal((3 * 64 * 64, classes), np.float32)
        return write_model(tmp_path / name, (wide, wide[0]), side=64)

    large, small = model("large.onnx", 1000), model("small.onnx", 10)
    rows = bench([small], float_file=large, images=None, timing=Timing(runs=30))
    assert rows[0].latency_ms.median > 5 * rows[1].latency_ms.median
    assert rows[1].ratio_to_float > 5


def test_the_ratio_is_the_median_over_rounds(tmp_path, weights, monkeypatch):
    seconds = np.array([[8.0, 30.0, 10.0], [4.0, 3.0, 2.0]])  # a round in which all was slow
    monkeypatch.setattr(bench_module, "interleave", lambda runners, runs: seconds)
    file = write_model(tmp_path / "m.onnx", weights)
    rows = bench([file], float_file=write_model(tmp_path / "f.onnx", weights), images=None)
    assert [row.ratio_to_float for row in rows] == [1.0, 5.0]
    assert [row.latency_ms.median for row in rows] == [10_000.0, 3_000.0]


def test_without_images_or_float_model_the_rest_is_measured(tmp_path, weights):
    (row,) = bench([write_model(tmp_path / "m.onnx", weights)], images=None, timing=Timing(runs=3))
    assert (row.top1, row.n, row.ratio_to_float) == (None, 0, None)
    assert row.latency_ms.median > 0


def test_interleave_rotates_the_order_and_drops_the_warm_up():
    calls = []
    runners = [lambda i=i: calls.append(i) for i in range(3)]
    times = interleave(runners, runs=2, warmup=1)
    assert calls == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert times.shape == (3, 2)


def test_interleave_times_each_runner_itself():
    times = interleave([lambda: time.sleep(0.001), lambda: time.sleep(0.006)], runs=5, warmup=0)
    assert times[0].min() >= 0.001
    assert times[1].min() >= 0.006
    assert np.median(times[0]) < 0.005


def test_peak_memory_is_the_files_own(tmp_path, weights):
    wide = np.ones((3 * SIDE * SIDE, 40_000), np.float32)  # 123 MB
    large = write_model(tmp_path / "large.onnx", (wide, wide[0]))
    small = write_model(tmp_path / "small.onnx", weights)
    burden = np.ones(40_000_000)  # 320 MB of this process, which a child must not be charged with
    first, second = (peak_mb(p, batch=1, threads=1) for p in (small, large))
    assert 20 < first < 250
    assert second > first + 100
    assert burden[-1] == 1


def test_bytes_count_external_data(tmp_path, weights):
    path = write_model(tmp_path / "m.onnx", weights, external=True)
    parts = list(tmp_path.iterdir())
    assert len(parts) == 2
    assert file_bytes(path) == sum(p.stat().st_size for p in parts)


def test_a_file_tells_its_policy(tmp_path, weights, caplog):
    info = file_info(write_model(tmp_path / "a.onnx", weights, policy=told("cifar10")))
    assert (info.normalize, info.input, info.classes, info.data) == (
        *("cifar10", (3, SIDE, SIDE), 10),
        "digits",
    )
    foreign = file_info(write_model(tmp_path / "b.onnx", weights))
    assert (foreign.normalize, foreign.input, foreign.data) == (None, (3, SIDE, SIDE), None)
    later = file_info(
        write_model(tmp_path / "c.onnx", weights, policy='{"policy": {"version": 9}}')
    )
    assert later == foreign
    assert "c.onnx cannot be read" in caplog.text


def test_a_silent_file_is_normalized_as_its_neighbour(tmp_path, digits, weights):
    _, _, images, labels = digits
    speaks = write_model(tmp_path / "a.onnx", weights, policy=told("none"))
    silent = write_model(tmp_path / "b.onnx", weights)
    rows = bench([silent, speaks], images=images, labels=labels, timing=Timing(runs=1))
    assert rows[0].top1 == rows[1].top1 == round(oracle(weights, images, labels), 2)


def test_mistakes_are_told(tmp_path, digits, weights):
    _, _, images, labels = digits
    path, rgb = write_model(tmp_path / "m.onnx", weights), Normalization.parse("none")
    with pytest.raises(UsageError, match=r"absent\.onnx does not exist"):
        bench([tmp_path / "absent.onnx"], images=None)
    with pytest.raises(UsageError, match="at least one model file"):
        bench([], images=None)
    with pytest.raises(UsageError, match=r"at least 1\. Got 1, 0 and 200"):
        Timing(batch=0)
    with pytest.raises(DataError, match=r"does not say how.*--normalize"):
        bench([path], images=images, labels=labels)
    with pytest.raises(DataError, match=r"3x16x16 each\. Got 3x8x16"):
        top1(path, images[:, ::2], labels, rgb)
    with pytest.raises(DataError, match=r"10 classes apart.*labels up to 99"):
        top1(path, images[:1], np.array([99]), rgb)
    fixed = write_model(tmp_path / "fixed.onnx", weights, batch=4)
    with pytest.raises(UsageError, match="runs 4 images at a time"):
        bench([fixed], images=None)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"broken\.onnx must be an ONNX model that onnxruntime"):
        bench([broken], images=None)


def test_run_refuses_what_the_model_does_not_take(tmp_path, weights):
    loaded = runtime.session(write_model(tmp_path / "m.onnx", weights))
    with pytest.raises(DataError, match=r"must be float32 of 4 dimensions\. Got uint8"):
        runtime.run(loaded, np.zeros((1, 3, SIDE, SIDE), np.uint8))
    with pytest.raises(DataError, match="at least one image"):
        runtime.run(loaded, np.zeros((0, 3, SIDE, SIDE), np.float32))


def test_the_optimized_graph_differs_from_the_written_one(tmp_path, weights):
    path = write_model(tmp_path / "m.onnx", weights, form="nchw")
    held = runtime.session(path, optimize=False)
    x = np.arange(3 * SIDE * SIDE, dtype=np.uint8).reshape(1, 3, SIDE, SIDE)
    same = runtime.run(runtime.session(path.read_bytes()), x)
    assert np.allclose(runtime.run(held, x), same, rtol=1e-5)
    assert {n.op_type for n in runtime.optimized_model(path).graph.node} >= {"Gemm"}


def test_the_runtimes_own_int8_files(tmp_path, digits, weights):
    train, _, images, labels = digits
    rgb = Normalization.parse("none")
    source = write_model(tmp_path / "float.onnx", weights)
    static = onnxruntime_static(source, tmp_path / "p" / "s.onnx", rgb.apply(train[:64]))
    dynamic = onnxruntime_dynamic(source, tmp_path / "p" / "d.onnx")
    assert "QGemm" in {n.op_type for n in runtime.optimized_model(static).graph.node}
    for path in (static, dynamic):
        assert path.stat().st_size < 0.5 * source.stat().st_size
        assert abs(top1(path, images, labels, rgb) - oracle(weights, images, labels)) < 3
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["d.onnx", "s.onnx"]


def test_the_probe_survives_a_model_that_does_not_load(tmp_path, caplog):
    assert peak_mb(tmp_path / "absent.onnx", batch=1, threads=1) is None
    assert "could not be measured" in caplog.text


def test_bench_needs_no_torch():
    code = f"import sys, {bench_module.__name__}, mpq.cli.bench; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
