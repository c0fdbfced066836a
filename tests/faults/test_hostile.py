"""Files that want memory, time or a traceback: each is refused before it is read."""

from __future__ import annotations

import os
import pickle
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from mpq import zoo
from mpq.checkpoint import load_model, save_model
from mpq.cli import main
from mpq.data import open_data
from mpq.errors import CheckpointError, DataError, PolicyError
from mpq.limits import limited
from mpq.policy import ModelInfo, Policy

INFO = ModelInfo(arch="resnet20", classes=10, input=(3, 16, 16), normalize="none")


def state(**changes: Any) -> dict[str, Any]:
    return {**zoo.build("resnet20", 10).state_dict(), **changes}


def bomb(path: Path, name: str, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(name, "w") as f:
        f.write(bytes(size))


def zip_bomb(path: Path) -> None:
    bomb(path, "archive/data.pkl", 50_000_000)


def lying_archive(path: Path) -> None:
    torch.save(state(), path)
    content = bytearray(path.read_bytes())
    where = content.rfind(b"PK\x01\x02")
    content[where + 24 : where + 28] = (4_000_000_000).to_bytes(4, "little")
    path.write_bytes(bytes(content))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def cyclic(path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, path)


def nested(path: Path) -> None:
    content: Any = 0
    for _ in range(100):
        content = {"state_dict": content}
    torch.save(content, path)


def tensor(make: Callable[[], torch.Tensor]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        torch.save(state(**{"fc.weight": make()}), path)

    return write


CHECKPOINTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "zip bomb": (zip_bomb, "that says it holds 50.0 MB"),
    "sizes that lie": (lying_archive, "that says it holds"),
    "pipe": (pipe, "must be a regular file"),
    "device": (device, "must be a regular file"),
    "cyclic": (cyclic, "must hold a state dict"),
    "nested": (nested, "must hold a state dict|damaged"),
    "expanded": (
        tensor(lambda: torch.zeros(1).expand(10**10)),
        "000,000 values in 4 bytes",
    ),
    "meta": (tensor(lambda: torch.empty(10, 64, device="meta")), "has no values|damaged"),
    "sparse": (tensor(lambda: torch.zeros(10, 64).to_sparse()), "is torch.sparse_coo"),
    "complex": (tensor(lambda: torch.zeros(10, 64, dtype=torch.cfloat)), "but is torch.complex64"),
    "int8": (tensor(lambda: torch.zeros(10, 64, dtype=torch.int8)), "but is torch.int8"),
    "int64": (tensor(lambda: torch.zeros(10, 64, dtype=torch.int64)), "but is torch.int64"),
    "bool": (tensor(lambda: torch.zeros(10, 64, dtype=torch.bool)), "but is torch.bool"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(print)), "can run any code|damaged"),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_hostile_checkpoint_is_refused(kind: str, tmp_path: Path) -> None:
    make, told = CHECKPOINTS[kind]
    make(tmp_path / "model.pth")
    start = time.process_time()
    with pytest.raises(CheckpointError, match=told):
        load_model(tmp_path / "model.pth")
    assert time.process_time() - start < 20


def test_a_flipped_byte_in_a_file_of_ours_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_model(path, zoo.build("resnet20", 10), info=INFO)
    whole = path.read_bytes()
    weights = max(zipfile.ZipFile(path).infolist(), key=lambda member: member.file_size)
    for offset in (200, weights.file_size // 2):
        damaged = bytearray(whole)
        damaged[weights.header_offset + offset] ^= 1
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match=r"model\.pth .*(checksum|damaged)"):
            load_model(path)
    path.write_bytes(whole)
    assert load_model(path).info.arch == "resnet20"


def test_weights_that_are_not_those_that_were_saved_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    save_model(path, zoo.build("resnet20", 10), info=INFO)
    content = torch.load(path, weights_only=True)
    next(iter(content["state"].values())).view(-1)[0] += 1.0
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"must have the sha256 .* damaged or was changed"):
        load_model(path)


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
POLICIES = {
    "aliases": (ALIASES, "exceeds the limit yaml-values"),
    "cyclic": ("version: 1\nevidence: &a {b: *a}\n", None),
    "nested": ("[" * 50_000, "nested too deeply"),
    "nested mappings": ("{a: " * 5_000, "nested too deeply"),
    "many values": ("version: 1\nlayers: [" + "a, " * 300_000 + "]", "exceeds the limit yaml-val"),
    "large": ("#" * 50_000_000, "exceeds the limit text-mb=8"),
    "a key twice": ("version: 1\nlayers: []\nlayers: []\n", "line 3 gives the key 'layers' a sec"),
    "a key twice, below": (
        "version: 1\ndata: {name: none, seed: 1, seed: 2}\n",
        "line 2 gives the key 'seed' a second time",
    ),
    "a date that is none": ("version: 1\nevidence: {a: 2020-99-99}\n", "not valid YAML"),
    "size": ("version: 1\nmodel: {arch: a, classes: 2, input: [3, 1000000, 1000000]}\n", "input-m"),
    "classes": ("version: 1\nmodel: {arch: a, classes: 2000000000}\n", "limit classes=100000"),
    "no size": ("version: 1\nmodel: {arch: a, classes: 2, input: [3, 0, 5]}\n", "input must be"),
    "tag": ("version: 1\nevidence: !!python/object/apply:os.system [ls]\n", "not valid YAML"),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_hostile_policy_is_refused(kind: str, tmp_path: Path) -> None:
    text, told = POLICIES[kind]
    (tmp_path / "p.yaml").write_text(text)
    start = time.process_time()
    if told is None:
        Policy.load(tmp_path / "p.yaml")
    else:
        most = 5_000 if kind == "many values" else 100_000
        with limited(yaml_values=most), pytest.raises(PolicyError, match=told):
            Policy.load(tmp_path / "p.yaml")
    assert time.process_time() - start < 20


@pytest.mark.parametrize("kind", [pipe, device])
def test_a_policy_is_a_file(kind: Callable[[Path], None], tmp_path: Path) -> None:
    kind(tmp_path / "p.yaml")
    with pytest.raises(PolicyError, match="must be a regular file"):
        Policy.load(tmp_path / "p.yaml")


def test_a_limit_can_be_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(Policy().to_yaml() + "#" * 20_000)
    assert main(["--limit", "text-mb=0.01", "diff", "p.yaml", "p.yaml"]) == 2
    assert "mpq --limit text-mb=VALUE" in capsys.readouterr().err
    assert main(["--limit", "text-mb=0.1", "diff", "p.yaml", "p.yaml"]) == 0
    assert main(["diff", "p.yaml", "p.yaml"]) == 0
    for wrong in ("text=1", "text-mb", "text-mb=0", "text-mb=nan", "text-mb=x"):
        assert main(["--limit", wrong, "diff", "p.yaml", "p.yaml"]) == 2


def picture(path: Path, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("1", size).save(path)


def test_an_image_is_refused_by_its_header(tmp_path: Path) -> None:
    for label in "ab":
        picture(tmp_path / "d" / label / "1.png", (9_000, 9_000))
    with pytest.raises(DataError, match="exceeds the limit megapixels=50: 9000 x 9000"):
        open_data(tmp_path / "d", size=(8, 8)).train.read([0])


def test_an_archive_of_pictures_is_unpacked_in_bounds(tmp_path: Path) -> None:
    for label in "ab":
        bomb(tmp_path / "d.zip", f"{label}/1.png", 65_000_000)
    with pytest.raises(DataError, match=r"exceeds the limit image-mb=64: it has 65\.0 MB"):
        open_data(tmp_path / "d.zip", size=(8, 8)).train.read([0])
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(DataError, match="must be a folder or an archive"):
        open_data(tmp_path / "pipe.zip")


def test_limits_hold_for_a_block() -> None:
    text = yaml.safe_dump({"version": 1, "layers": []})
    with limited(yaml_values=3), pytest.raises(PolicyError, match="yaml-values=3"):
        Policy.from_yaml(text)
    assert Policy.from_yaml(text) == Policy()
