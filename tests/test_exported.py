"""`.pt2` files: taken as the networks that were exported, and refused where they would run code."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch.export import Dim, export, save

from mpq import to_float
from mpq.capture.exported import open_exported
from mpq.errors import CheckpointError

NAMES = ["plain", "residual", "depthwise", "concat", "se_hardsigmoid", "functional",
         "global_mean", "pre_activation", "one_dimension", "transposed", "shuffle", "gated",
         "attention"]  # fmt: skip


def exported(name: str, folder: Path) -> Path:
    path = folder / f"{name}.pt2"
    program = export(nets.build(name), (nets.images(),), dynamic_shapes=({0: Dim.AUTO},))
    save(program, path)
    return path


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_program_is_the_network_that_it_was(name: str, tmp_path: Path):
    network = open_exported(exported(name, tmp_path))
    graph, model = to_float(network.module, network.args[0]), nets.build(name)
    x = nets.images(3, seed=4)
    torch.testing.assert_close(graph.module(x), model(x), atol=1e-5, rtol=1e-4)
    kinds = [info.kind for info in to_float(model, x).layers.values()]
    if name != "attention":  # torch.export has opened it already
        assert [info.kind for info in graph.layers.values()] == kinds


def test_layers_are_at_the_paths_of_their_weights(tmp_path: Path):
    network = open_exported(exported("residual", tmp_path))
    graph = to_float(network.module, network.args[0])
    assert list(graph.layers) == ["conv1", "conv2", "conv3", "head.2"]
    plain = to_float(nets.build("residual"), nets.images())
    kinds = [n.target for n in graph.module.graph.nodes if n.op == "call_module"]
    assert set(graph.module.state_dict()) == set(plain.module.state_dict())
    assert "conv1" in kinds


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("ran",)


def other(change: Callable[[str, bytes], bytes]) -> Callable[[dict[str, bytes]], None]:
    def apply(parts: dict[str, bytes]) -> None:
        for name in list(parts):
            parts[name] = change(name, parts[name])

    return apply


def replaced(old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    return other(lambda name, data: data.replace(old.encode(), new.encode()))


def evil_inputs(parts: dict[str, bytes]) -> None:
    name = next(n for n in parts if "sample_inputs" in n)
    parts[name] = pickle.dumps(Evil())


def with_object(parts: dict[str, bytes]) -> None:
    name = next(n for n in parts if n.endswith("constants_config.json"))
    parts[name] = json.dumps({"config": {"o": {"path_name": "opaque_obj_0"}}}).encode()


def with_library(parts: dict[str, bytes]) -> None:
    root = next(iter(parts)).partition("/")[0]
    parts[f"{root}/data/aotinductor/model/m.so"] = b""


CHANGES = {
    "pickled weights": (replaced('"use_pickle": false', '"use_pickle": true'), "are pickled"),
    "pickled inputs": (evil_inputs, "model.pt is a pickle that would run code"),
    "objects": (with_object, "holds an object of its own, opaque_obj_0"),
    "a library": (with_library, r"data/aotinductor/model/m.so is not one of its parts"),
    "a function": (replaced("torch.ops.aten.relu.default", "torch.os.system"), "calls torch.os.sy"),
    "an expression": (
        replaced("Symbol('s77', positive=True, integer=True)", "exec(chr(49))"),
        r"a size is given as 'exec\(chr\(49\)\)'",
    ),
    "no program": (lambda parts: [parts.pop(n) for n in list(parts) if "models" in n], "deserial"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_files_that_would_run_code_are_refused(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = exported("residual", tmp_path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    before = dict(parts)
    change(parts)
    assert parts != before
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match=rf"residual.pt2 must be a program.*{message}"):
        open_exported(path)
    assert not Path("ran").exists()


def test_other_files_are_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"gone.pt2 does not exist"):
        open_exported(tmp_path / "gone.pt2")
    torch.save(nets.build("plain").state_dict(), tmp_path / "state.pt2")
    with pytest.raises(CheckpointError, match=r"state.pt2 must be a program.*not one of its parts"):
        open_exported(tmp_path / "state.pt2")
    (tmp_path / "text.pt2").write_text("no archive")
    with pytest.raises(CheckpointError, match=r"text.pt2 must be a program.*cannot be read"):
        open_exported(tmp_path / "text.pt2")
