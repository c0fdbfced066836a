"""Pictures prepared as a network of timm configures it; the user's options come first."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

import mpq
from mpq._torchvision import transforms
from mpq.checkpoint import Reading
from mpq.cli import main
from mpq.data import DataSource, Normalization, open_data, open_unlabelled
from mpq.data.images import Fit, fit
from mpq.errors import DataError
from mpq.export.fileinfo import file_info
from mpq.pipeline.subject import open_checkpoint
from mpq.pipeline.training import new_subject
from mpq.policy import Policy
from mpq.userimport import trusting
from mpq.zoo.libraries import declared_pictures

CODE = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(4)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pool, nn.Flatten(), nn.Linear(64, 2))
    made.pretrained_cfg = {
        "input_size": (3, 16, 16), "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25),
        "interpolation": "bicubic", "crop_pct": 0.8, "crop_mode": "center",
    }
    return made
"""
OWN = "0.5,0.5,0.5/0.25,0.25,0.25"


def network() -> nn.Module:
    made: dict[str, Any] = {}
    exec(CODE, made)
    found: nn.Module = made["net"]()
    return found


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def here(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "timmlike.py").write_text(CODE)
    for number in range(24):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(24 + number, 40, number).save(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "timmlike", raising=False)
    return tmp_path


@pytest.mark.parametrize("size", [(48, 70), (70, 48), (40, 40), (21, 300)])
@pytest.mark.parametrize("text", ["bicubic 0.875", "bilinear 0.95", "bicubic 0.9 squash"])
def test_pictures_are_fitted_as_timm_evaluates(size, text):
    how, image = Fit.parse(text), noise(*size)
    large = int(32 / how.crop)
    v2, mode = transforms(), getattr(transforms().InterpolationMode, how.interpolation.upper())
    resize = v2.Resize((large, large) if how.squash else large, interpolation=mode)
    wanted = v2.CenterCrop(32)(resize(image))
    assert np.array_equal(fit(image, (32, 32), how), wanted)
    assert str(how) == text


@pytest.mark.parametrize("text", ["bicubic", "cubic 0.9", "bicubic 0.0", "bicubic 1.2", "box 1 x"])
def test_no_way_to_fit_pictures(text):
    with pytest.raises(DataError, match=f"as in bicubic 0.875. Got '{text}'"):
        Fit.parse(text)


def test_a_picture_of_the_right_size_is_left_alone():
    image = noise(32, 32)
    assert fit(image, (32, 32), Fit("bicubic", 0.8)) is image


def test_a_network_brings_its_configuration_to_every_command(here, caplog):
    assert main(["analyze", "timmlike:net", "--data", "pictures", "-o", "r"]) == 0
    told = f"as timmlike:net configures itself: 3x16x16, fitted by bicubic 0.8, normalization {OWN}"
    assert told in caplog.text
    caplog.clear()
    model = Policy.load(here / "r" / "policy.yaml").model
    assert model is not None
    assert (model.input, model.normalize, model.pictures) == ((3, 16, 16), OWN, "bicubic 0.8")
    assert main(["ptq", "r"]) == 0
    assert main(["export", "r", "--num-test", "4"]) == 0
    assert file_info(here / "r" / "model.onnx").pictures == "bicubic 0.8"
    assert main(["bench", "r/model.onnx", "--runs", "2"]) == 0
    assert "configures itself" not in caplog.text  # it is said once


def test_what_is_read_is_what_the_configuration_says(here):
    plain = open_data("pictures", size=(16, 16)).train
    asked = open_data("pictures", size=(16, 16), pictures="bicubic 0.8").train
    index = int(asked.indices[0])
    wanted = fit(asked.parent.picture(index), (16, 16), Fit("bicubic", 0.8))
    assert np.array_equal(asked.read([0])[0], wanted)
    assert not np.array_equal(asked.read([0]), plain.read([0]))
    whole = open_unlabelled("pictures", size=(16, 16), pictures="bicubic 0.8")
    assert np.array_equal(whole.read([index])[0], wanted)


def test_the_users_options_win(here):
    with trusting("timmlike:net"):
        subject = open_checkpoint(
            Path("timmlike:net"), DataSource("pictures"),
            reading=Reading(input=(8, 8)), normalize=Normalization.parse("none"),
        )  # fmt: skip
        trained = new_subject("timmlike:net", DataSource("pictures"))
    assert (subject.info.input, subject.info.normalize) == ((3, 8, 8), "none")
    assert trained.info.normalize == OWN
    assert trained.info.pictures == "bicubic 0.8"


def test_a_network_as_a_value_is_given_pictures_as_it_configures(here):
    model = mpq.ptq(network(), "pictures", effort="fast").policy.model
    assert model is not None
    assert (model.input, model.normalize, model.pictures) == ((3, 16, 16), OWN, "bicubic 0.8")


def test_a_configuration_that_mpq_does_not_know_is_not_taken(here):
    other = network()
    other.pretrained_cfg |= {"crop_mode": "border", "mean": (0.5,)}
    assert declared_pictures(other) == ("", None)


def test_timm_prepares_pictures_so():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    own = timm.create_model("test_efficientnet", num_classes=3)
    config, (normalize, pictures) = timm.data.resolve_data_config(model=own), declared_pictures(own)
    image, (height, width) = noise(200, 300), config["input_size"][1:]
    wanted = timm.data.create_transform(**config)(image)
    made = np.asarray(fit(image, (height, width), Fit.parse(pictures)))[None]
    assert np.abs(Normalization.parse(normalize).apply(made)[0] - wanted.numpy()).max() < 1e-5
