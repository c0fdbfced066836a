"""What the recipe `fast` is made of, a whitened layer and alternating flips; and a clean stop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mpq.data import Normalization
from mpq.errors import UsageError
from mpq.rundir import Run
from mpq.train.augment import alternating, shift_flip
from mpq.train.loop import fit
from mpq.train.plan import Hooks, Stop, TrainingData, TrainingPlan
from mpq.train.recipe import Recipe
from mpq.train.whiten import whiten_first_layer
from mpq.zoo import build


def correlated(count: int = 64) -> torch.Tensor:
    """Images whose neighbouring pixels and channels say nearly the same."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, 3, 16, 16, generator=generator)
    smooth = nn.functional.avg_pool2d(noise, 3, 1, 1)
    return smooth + smooth.mean(1, keepdim=True)


def test_a_whitened_layer_gives_uncorrelated_outputs_of_one_variance() -> None:
    layer = nn.Conv2d(3, 24, 3, bias=False)
    assert whiten_first_layer(nn.Sequential(layer, nn.ReLU()), correlated()) == 24
    out = layer(correlated()).detach().transpose(0, 1).flatten(1).double()
    covariance = torch.cov(out)
    assert torch.equal(layer.weight[:12], -layer.weight[12:])
    half = covariance[:12, :12]
    scale = half.diagonal().mean()
    torch.testing.assert_close(half / scale, torch.eye(12).double(), atol=0.1, rtol=0)
    plain = nn.Conv2d(3, 24, 3, bias=False)
    other = torch.cov(plain(correlated()).detach().transpose(0, 1).flatten(1).double())
    spread = other.diagonal().max() / other.diagonal().min()
    assert spread > 3 * half.diagonal().max() / half.diagonal().min()


def test_what_filters_do_not_fill_stays_as_it_was() -> None:
    layer = nn.Conv2d(3, 64, 3, bias=False)
    before = layer.weight.detach().clone()
    assert whiten_first_layer(layer, correlated()) == 54
    assert torch.equal(layer.weight[54:], before[54:])
    assert not torch.equal(layer.weight[:54], before[:54])
    assert float(layer.weight.detach()[:54].std()) == pytest.approx(float(before.std()), rel=0.01)


def test_a_network_without_a_first_convolution_is_refused() -> None:
    with pytest.raises(UsageError, match=r"whiten needs a network whose first layer is a convol"):
        whiten_first_layer(nn.Linear(3, 4), correlated())


def test_each_image_is_mirrored_in_every_second_epoch() -> None:
    images = pixels(16)
    sides = torch.from_numpy(alternating(16, seed=1))
    assert 0 < int(sides.sum()) < 16
    even, odd = (shift_flip(images, 0, True, np.random.default_rng(0), s) for s in (sides, ~sides))
    assert torch.equal(even[sides], images[sides].flip(2))
    assert torch.equal(even[~sides], images[~sides])
    assert torch.equal(odd, even.flip(2))


def pixels(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)


def data(count: int = 32) -> TrainingData:
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(count) % 4
    return TrainingData((images, labels), None, Normalization.parse("none"))


FAST = Recipe.load("fast").override({"epochs": 3, "batch": 16, "precision": "float32"})


def test_fast_trains_and_resumes_to_the_same_weights(tmp_path) -> None:  # type: ignore[no-untyped-def]
    whole, parts = (build("resnet8", 4) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    fit(whole, data(), TrainingPlan(FAST), Run(tmp_path / "whole"))
    rare = FAST.override({"checkpoint_every": 2})
    began = {k: v.clone() for k, v in parts.state_dict().items()}

    def stop(record: dict[str, object]) -> None:
        if record["epoch"] == 0:
            raise Stop

    with pytest.raises(Stop):
        fit(parts, data(), TrainingPlan(rare), Run(tmp_path / "parts"), Hooks(on_epoch=stop))
    parts.load_state_dict(began)  # a new process begins where the first did
    found = fit(parts, data(), TrainingPlan(rare), Run(tmp_path / "parts", resume=True))
    assert len(found.history) == 3
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_alternate_without_flip_is_refused() -> None:
    with pytest.raises(UsageError, match=r"alternate needs flip: set both or neither"):
        Recipe().override({"alternate": True, "flip": False})
