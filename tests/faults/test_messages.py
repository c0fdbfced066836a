"""What goes wrong outside of mpq is told in one message that names the file, before the work."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from mpq import files, rundir
from mpq.checkpoint import save_atomic
from mpq.cli import main
from mpq.data import open_data
from mpq.errors import (
    CheckpointError,
    DataError,
    ExportError,
    PolicyError,
    UsageError,
    printable,
)
from mpq.export import runtime
from mpq.export.meta import KEY, from_metadata
from mpq.limits import limited
from mpq.ptq.store import ActivationStore
from mpq.userimport import trusting


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sensitivity.json"
    path.write_text("old")
    big = "x" * 50_000_000
    with full_disk(40_000_000), pytest.raises(OSError, match=r"sensitivity\.json"):
        files.write_text(path, big)
    model, weights = tmp_path / "model.pth", torch.zeros(12_000_000)
    told = pytest.raises(CheckpointError, match=r"model\.pth cannot be written: File too large")
    with full_disk(40_000_000), told:
        save_atomic({"a": weights}, model)
    assert [p.name for p in tmp_path.iterdir()] == ["sensitivity.json"]
    assert path.read_text() == "old"


@contextmanager
def mounted(place: Path, *argv: str) -> Iterator[Path]:
    """A file system of its own."""
    place.mkdir()
    done = subprocess.run(["mount", *argv, str(place)], capture_output=True) if argv else None
    if os.geteuid() != 0 or (done and done.returncode):
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture
def full_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Half a megabyte."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=512k", "tmpfs") as place:
        monkeypatch.setattr(tempfile, "tempdir", str(place))
        yield place


@pytest.fixture
def read_only(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The project as working directory, in which nothing can be written."""
    with mounted(tmp_path / "ro", "--bind", str(here)) as place:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True)
        monkeypatch.chdir(place)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        shutil.copytree(here / "state", tmp_path / "state")
        yield place
        monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("read_only")
@pytest.mark.parametrize(
    "command",
    [
        "analyze model.pth --model mine:tiny -o r --force",
        "ptq --policy r --force",
        "qat --policy r --force",
        "export r --force",
        "verify r",
        "verify r --exact",
        "bench r",
        "report r",
        "train mine:tiny --data mine:images --force -o model.pth",
        "ensemble model.pth --force -o ens.pth",
    ],
)
def test_a_read_only_folder_is_found_out_before_the_work(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for work in ("mpq.export.runtime.run", "mpq.export.runtime.values", "mpq.checkpoint.load_safe"):
        monkeypatch.setattr(work, lambda *_, **__: pytest.fail("it worked first"))
    assert main(command.split()) == 2
    told = capsys.readouterr().err
    assert "cannot be written: " in told
    assert "Read-only file system" in told


@pytest.mark.usefixtures("read_only")
def test_a_read_only_working_directory_holds_up_nobody(tmp_path: Path) -> None:
    out = tmp_path / "out"
    named = ["--model", "mine:tiny", "--data", "mine:images", "--num-calib", "8"]
    assert main(["analyze", "model.pth", *named, "-o", str(out)]) == 0
    assert main(["certify", "r"]) == 0
    assert (out / "policy.yaml").is_file()


def test_a_full_temporary_folder_is_told_and_not_the_model(full_temporary_folder: Path) -> None:
    """The runtime's own optimized graph is written there, and activations of a calibration."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = helper.make_tensor("w", TensorProto.FLOAT, [8, 40_000], np.ones(320_000, np.float32))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "net", [image], [answer], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    told = r"the temporary folder \S+small is full: 0\.\d MB are free\. Make room, or set TMPDIR"
    with pytest.raises(UsageError, match=told):
        runtime.optimized_model(model.SerializeToString())
    with pytest.raises(UsageError, match=told), ActivationStore(0) as store:
        store.put(torch.zeros(1_000_000))
    assert not list(full_temporary_folder.iterdir())


def test_the_newest_run_need_not_be_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A working directory that cannot be written to: here, `runs` is a file."""
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()
    with caplog.at_level(logging.WARNING, logger="mpq"):
        rundir.touch_run(tmp_path / "elsewhere")
    told = f"runs cannot be written (File exists): name {tmp_path / 'elsewhere'} to the commands"
    assert told in caplog.text
    assert (tmp_path / "elsewhere").is_dir()


def test_control_characters_do_not_reach_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert printable("a\x1b[2J\r\x07é\n") == "a\\x1b[2J\\r\\x07é\n"
    monkeypatch.chdir(tmp_path)
    text = 'version: 1\nlayers: [{name: "a\\e[2J", weight: int4/channel}]\n'
    Path("a.yaml").write_text(text)
    Path("b.yaml").write_text(text.replace("int4", "int6") + 'evidence: {"a\\e[2J": {}}\n')
    main(["diff", "a.yaml", "b.yaml"])
    main(["diff", "a\x1b[2J.yaml", "b.yaml"])
    told = capsys.readouterr()
    assert "\x1b[2J" not in told.out + told.err
    assert "a\\x1b[2J" in told.err


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"policy": ' * 20_000, "", "null", '"' + "x" * 9_000_000 + '"']
)
def test_hostile_metadata_is_no_policy(text: str) -> None:
    with pytest.raises(PolicyError, match=r"the policy inside m\.onnx (cannot be read|exceeds)"):
        from_metadata({KEY: text}, "m.onnx")


def test_ragged_arrays_of_a_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ragged_data.py").write_text("def make(): return [[1], [2, 3]], [0, 1]\n")
    with trusting("ragged_data:make"), pytest.raises(DataError, match="must be arrays"):
        open_data("ragged_data:make")


def loop(path: Path, trips: int) -> None:
    """An image classifier that first turns round in a loop, of constants alone."""
    counter = [helper.make_tensor_value_info(n, TensorProto.INT64, []) for n in ("i", "c", "d")]
    flags = [helper.make_tensor_value_info(n, TensorProto.BOOL, []) for n in ("k", "l")]
    body = helper.make_graph(
        [helper.make_node("Add", ["c", "i"], ["d"]), helper.make_node("Identity", ["k"], ["l"])],
        "body",
        [counter[0], flags[0], counter[1]],
        [flags[1], counter[2]],
    )
    constants = [
        helper.make_tensor("trips", TensorProto.INT64, [], [trips]),
        helper.make_tensor("true", TensorProto.BOOL, [], [True]),
        helper.make_tensor("zero", TensorProto.INT64, [], [0]),
    ]
    nodes = [
        helper.make_node("Loop", ["trips", "true", "zero"], ["sum"], body=body),
        helper.make_node("Cast", ["sum"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("Add", ["mean", "float"], ["y"]),
    ]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "net", [image], [answer], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)


def test_a_loop_is_run_in_a_time_limit(tmp_path: Path) -> None:
    loop(tmp_path / "short.onnx", 3)
    found = runtime.run(
        runtime.session(tmp_path / "short.onnx"), np.zeros((1, 3, 8, 8), np.float32)
    )
    assert found.tolist() == [[3.0, 3.0, 3.0]]
    loop(tmp_path / "endless.onnx", 2**62)
    told = pytest.raises(ExportError, match="limit onnx-seconds=1: it was not loaded")
    with limited(onnx_seconds=1), told:
        runtime.session(tmp_path / "endless.onnx")


def test_a_model_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").symlink_to("/dev/zero")
    with pytest.raises(ExportError, match="must be a regular file"):
        runtime.session(tmp_path / "m.onnx")


def test_a_file_for_one_image_may_answer_without_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As other tools write it: batch 1, and an answer `[classes]`."""
    nodes = [helper.make_node("ReduceMean", ["x"], ["y"], axes=[0, 2, 3], keepdims=0)]
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])
    answer = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    graph = helper.make_graph(nodes, "net", [image], [answer])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "m.onnx")
    images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    found = runtime.run(runtime.session("m.onnx"), images)
    assert np.allclose(found, images.mean((2, 3)), atol=1e-6)
    assert main(["verify", "m.onnx", "--exact", "--data", "digits"]) == 0
    assert main(["verify", "m.onnx", "--exact"]) == 0


def test_metadata_that_lies_about_its_network_is_told() -> None:
    told = json.dumps({"policy": {"version": 1, "model": {"arch": "a", "classes": 10**12}}})
    with pytest.raises(PolicyError, match="limit classes=100000"):
        from_metadata({KEY: told}, "m.onnx")
