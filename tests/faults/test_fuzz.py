"""Damage at random: what is read is right, or it is refused with an error of ours."""

from __future__ import annotations

import io
import json
import os
import random
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mpq import zoo
from mpq.checkpoint import load_model, save_model
from mpq.data import Normalization, open_data
from mpq.errors import CheckpointError, MpqError, PolicyError
from mpq.export.meta import KEY, from_metadata, to_metadata
from mpq.limits import limited
from mpq.numerics import choose_qparams, dequantize, quantize
from mpq.policy import LayerPolicy, ModelInfo, Policy
from mpq.spec import WIDTHS, QuantSpec
from mpq.train.ensemble import Ensemble, Member, load_ensemble, save_ensemble

Tell = Callable[[str, str], None]
Tries = Callable[[int, int], range]
INFO = ModelInfo(arch="resnet20", classes=10, input=(3, 16, 16), normalize="none")
POLICY = Policy(
    model=INFO, layers=(LayerPolicy(name="conv1", weight="int8/channel", reason="stem"),)
)


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut off, put in, doubled, or zeroed."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if data else 0
        size = rng.choice((1, 4, 64, 4096))
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([(data[at] if data else 0) ^ 1 << rng.randrange(8)])
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(size)
            case 3:
                data[at:at] = data[at : at + size]
            case _:
                data[at : at + size] = bytes(len(data[at : at + size]))
    return bytes(data)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    return zoo.build("resnet20", 10)


def test_a_damaged_checkpoint_of_ours_is_whole_or_refused(
    network: torch.nn.Module, tmp_path: Path, tell: Tell, tries: Tries
) -> None:
    path, rng, right = tmp_path / "model.pth", random.Random(0), network.state_dict()
    save_model(path, network, info=INFO, data="digits")
    whole = path.read_bytes()
    for _ in tries(20, 400):
        path.write_bytes(damaged(whole, rng))
        try:
            loaded = load_model(path)
        except CheckpointError:
            tell("damaged checkpoints of mpq", "refused")
        else:
            assert same(loaded.module.state_dict(), right)
            assert loaded.info.replace(checkpoint="", sha256="") == INFO
            tell("damaged checkpoints of mpq", "survived")


def test_a_damaged_foreign_checkpoint_is_refused_or_read(
    network: torch.nn.Module, tmp_path: Path, tell: Tell, tries: Tries
) -> None:
    """It has no hash: other weights may be read, but finite ones, of the network's shapes."""
    path, rng = tmp_path / "model.pth", random.Random(1)
    torch.save(network.state_dict(), path)
    whole = path.read_bytes()
    for _ in tries(10, 200):
        path.write_bytes(damaged(whole, rng))
        try:
            loaded = load_model(path)
        except MpqError:
            tell("damaged foreign checkpoints", "refused")
        else:
            assert all(bool(t.isfinite().all()) for t in loaded.module.state_dict().values())
            tell("damaged foreign checkpoints", "survived")


def test_a_damaged_ensemble_is_whole_or_refused(
    network: torch.nn.Module, tmp_path: Path, tell: Tell, tries: Tries
) -> None:
    path, rng, right = tmp_path / "ens.pth", random.Random(2), network.state_dict()
    norm = Normalization.parse("none")
    member = Member("a", network, norm, None, "resnet20", 10, (3, 16, 16))
    save_ensemble(path, Ensemble([member]))
    whole = path.read_bytes()
    for _ in tries(10, 100):
        path.write_bytes(damaged(whole, rng))
        try:
            found = load_ensemble(path)
        except MpqError:
            tell("damaged ensembles", "refused")
        else:
            assert same(found.members[0].module.state_dict(), right)
            tell("damaged ensembles", "survived")


def test_a_damaged_archive_of_images_is_read_or_refused(
    tmp_path: Path, tell: Tell, tries: Tries
) -> None:
    path, rng, buffer = tmp_path / "d.zip", random.Random(3), io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for label in "abc":
            for k in range(4):
                image = io.BytesIO()
                pixels = np.random.default_rng(k).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(image, ("png", "jpeg", "bmp", "webp")[k])
                archive.writestr(
                    f"{label}/{k}.{('png', 'jpg', 'bmp', 'webp')[k]}", image.getvalue()
                )
    for _ in tries(30, 400):
        path.write_bytes(damaged(buffer.getvalue(), rng))
        try:
            data = open_data(path, size=(8, 8))
            for split in (data.train, data.validation, data.test):
                if len(split):
                    assert split.read(range(len(split))).shape[1:] == (8, 8, 3)
        except MpqError:
            tell("damaged archives of images", "refused")
        else:
            tell("damaged archives of images", "survived")


def _read(read: Callable[[], object], tell: Tell, kind: str) -> None:
    try:
        read()
    except PolicyError:
        tell(kind, "refused")
    else:
        tell(kind, "survived")


def test_a_damaged_policy_is_read_or_refused(tell: Tell, tries: Tries) -> None:
    rng, text = random.Random(4), POLICY.to_yaml().encode()
    for _ in tries(50, 400):
        broken = damaged(text, rng).decode("utf-8", errors="replace")
        _read(lambda: Policy.from_yaml(broken), tell, "damaged policies")  # noqa: B023


def test_damaged_metadata_is_read_or_refused(tell: Tell, tries: Tries) -> None:
    rng, text = random.Random(5), to_metadata(POLICY).encode()
    for _ in tries(50, 300):
        broken = damaged(text, rng).decode("utf-8", errors="replace")
        _read(lambda: from_metadata({KEY: broken}, "m.onnx"), tell, "damaged metadata")  # noqa: B023


SOME = settings(
    max_examples=100 if "MPQ_FAULTS" in os.environ else 30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda below: (
        st.lists(below, max_size=4)
        | st.dictionaries(st.sampled_from(list(Policy.model_fields)) | st.text(max_size=4), below)
    ),
    max_leaves=8,
)


@SOME
@given(values=st.dictionaries(st.sampled_from(list(Policy.model_fields)), VALUES))
def test_a_policy_of_any_values_is_read_or_refused(values: dict[str, Any], tell: Tell) -> None:
    """Of JSON, which is YAML: what is read is written and read again as the same."""
    text = json.dumps({**values, "version": 1})
    try:
        found = Policy.from_yaml(text)
    except PolicyError:
        tell("policies of any values", "refused")
        return
    assert str(Policy.from_yaml(found.to_yaml())) == str(found)
    tell("policies of any values", "survived")


@SOME
@given(values=st.dictionaries(st.sampled_from(list(Policy.model_fields)), VALUES))
def test_metadata_of_any_values_is_read_or_refused(values: dict[str, Any], tell: Tell) -> None:
    for told in ({"policy": {**values, "version": 1}}, {"policy": values}, values, [values]):
        text = json.dumps(told)
        _read(lambda: from_metadata({KEY: text}, "m.onnx"), tell, "metadata of any values")  # noqa: B023


NAMES = st.text(st.sampled_from("ab/.\\\n-~ :0é"), min_size=1, max_size=12) | st.sampled_from(
    ["a/1.png", "b/1.png", "../../x.png", "/etc/1.png", "a/../b/1.jpg", "__MACOSX/a/._1.png"]
)


@SOME
@given(members=st.dictionaries(NAMES, st.binary(max_size=40), max_size=8))
def test_an_archive_of_any_names_stays_in_its_place(
    members: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory, tell: Tell
) -> None:
    folder, picture = tmp_path_factory.mktemp("archive"), io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "png")
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "d.zip", "w") as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members.items():
            archive.writestr(name, picture.getvalue() if len(content) % 2 else content)
    before = set(folder.parent.iterdir())
    try:
        data = open_data(folder / "d.zip", size=(8, 8))
        for split in (data.train, data.validation, data.test):
            if len(split):
                assert split.read(range(len(split))).shape[1:] == (8, 8, 3)
    except MpqError:
        tell("archives of any names", "refused")
    else:
        tell("archives of any names", "survived")
    assert [path.name for path in folder.iterdir()] == ["d.zip"]
    assert set(folder.parent.iterdir()) == before


@SOME
@given(text=st.text(alphabet=st.sampled_from("&*!|>{}[]:,-?#'\"%@ \n\tab1.~<="), max_size=60))
def test_a_policy_of_any_text_is_read_or_refused(text: str, tell: Tell) -> None:
    with limited(yaml_values=100):
        for whole in (text, f"version: 1\n{text}"):
            _read(lambda: Policy.from_yaml(whole), tell, "policies of any text")  # noqa: B023


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", WIDTHS)
def test_numerics_are_those_of_numpy(
    bits: int, signed: bool, granularity: Any, tell: Tell, tries: Tries
) -> None:
    """Over scales from 1e-20 to 1e20: the integers of double precision, halves to either side."""
    spec = QuantSpec(bits, signed, granularity)
    for seed in tries(2, 20):
        rng = np.random.default_rng(seed)
        size = 10.0 ** rng.uniform(-20, 20)
        x = torch.from_numpy((rng.standard_normal((4, 3, 5)) * size).astype(np.float32))
        dims = (1, 2) if granularity == "channel" else (0, 1, 2)
        scale, zero = choose_qparams(x.amin(dims), x.amax(dims), spec)
        q = quantize(x, scale, zero, spec)
        shape = (-1, 1, 1) if granularity == "channel" else (1, 1, 1)
        s, z = (t.double().numpy().reshape(shape) for t in (scale, zero))
        real = x.double().numpy() / s + z
        exact = np.clip(np.rint(real), spec.qmin, spec.qmax)
        half = np.abs(np.abs(real - np.floor(real)) - 0.5) < 2e-7 * 2**bits
        assert np.array_equal(exact[~half], q.double().numpy()[~half])
        assert np.abs(exact - q.double().numpy()).max() <= 1
        assert half.mean() < 0.2
        back = dequantize(q, scale, zero).double().numpy()
        assert np.allclose(back, (q.double().numpy() - z) * s, rtol=1e-6, atol=0)
        tell("quantization against numpy", "survived")
