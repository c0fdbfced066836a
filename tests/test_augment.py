from __future__ import annotations

import importlib
import math
from types import ModuleType

import numpy as np
import pytest
import torch

from mpq._torchvision import models
from mpq.errors import UsageError
from mpq.train.augment import Targets, augment, epoch_rng, erase, mix, shift_flip
from mpq.train.evaluate import to_unit
from mpq.train.recipe import Recipe
from mpq.train.trivial import OPERATIONS, rand_augment, trivial_augment

STRONG = Recipe(trivial=True, erase=0.5, mixup=0.4, cutmix=1.0)


def pictures(count: int = 8, height: int = 20, width: int = 28) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, height, width, 3)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def torchvision_transforms() -> ModuleType:
    models()  # prepares the import of torchvision beside a CPU-only torch
    return importlib.import_module("torchvision.transforms.v2")


def reference(name: str, image: torch.Tensor, strength: float, sign: float) -> torch.Tensor:
    """The same operation by torchvision, for one image."""
    f = torchvision_transforms().functional
    level = 0.99 * strength * sign
    shear = math.degrees(math.atan(level))
    height, width = image.shape[1:]
    steps = {
        "identity": lambda: image,
        "shear_x": lambda: f.affine(image, 0.0, [0, 0], 1.0, [shear, 0.0], center=[0, 0]),
        "shear_y": lambda: f.affine(image, 0.0, [0, 0], 1.0, [0.0, shear], center=[0, 0]),
        "translate_x": lambda: f.affine(
            image, 0.0, [int(math.floor(min(32, width) * strength) * sign), 0], 1.0, [0.0, 0.0]
        ),
        "translate_y": lambda: f.affine(
            image, 0.0, [0, int(math.floor(min(32, height) * strength) * sign)], 1.0, [0.0, 0.0]
        ),
        "rotate": lambda: f.rotate(image, 135 * strength * sign),
        "brightness": lambda: f.adjust_brightness(image, 1 + level),
        "color": lambda: f.adjust_saturation(image, 1 + level),
        "contrast": lambda: f.adjust_contrast(image, 1 + level),
        "sharpness": lambda: f.adjust_sharpness(image, 1 + level),
        "posterize": lambda: f.posterize(image, round(8 - 6 * strength)),
        "solarize": lambda: f.solarize(image, 1 - strength),
        "autocontrast": lambda: f.autocontrast(image),
        "equalize": lambda: f.equalize(image),
    }
    return steps[name]()


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_is_torchvisions(name):
    images = to_unit(pictures())
    strength, sign = torch.linspace(0, 1, 8), torch.tensor([1.0, -1.0] * 4)
    ours = OPERATIONS[name](images, strength, sign)
    triples = zip(images, strength.tolist(), sign.tolist(), strict=True)
    theirs = torch.stack([reference(name, *t) for t in triples])
    different = ((ours - theirs).abs() > 1e-5).float().mean().item()
    # A rotated point exactly between two pixels may go either way.
    assert different <= (2e-3 if name == "rotate" else 0.0)


def test_trivial_augment_keeps_places_and_range():
    images = to_unit(pictures(64))
    out = trivial_augment(images, np.random.default_rng(0))
    same = [i for i in range(64) if torch.equal(out[i], images[i])]
    assert 0 < len(same) < 32
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_rand_augment_is_torchvisions(name, monkeypatch):
    for magnitude in (0, 5, 9, 17, 30):
        compare_rand_augment(name, magnitude, monkeypatch)


def compare_rand_augment(name, magnitude, monkeypatch):
    class Always:
        """Chooses one operation, and signs in turn."""

        def integers(self, high, size):
            return np.full(size, index) if high == len(OPERATIONS) else np.arange(size) % 2

    index, images = list(OPERATIONS).index(name), to_unit(pictures())
    ours = rand_augment(images, Always(), operations=1, magnitude=magnitude)
    theirs = torchvision_transforms().RandAugment(1, magnitude)
    space = theirs._AUGMENTATION_SPACE
    wanted = [n for n in space if n.lower() == name.replace("_", "")]
    assert len(wanted) == 1
    monkeypatch.setattr(theirs, "_AUGMENTATION_SPACE", {n: space[n] for n in wanted})
    signed = space[wanted[0]][1]
    for one, sign, image in zip(ours, (0.9, 0.1) * 4, images, strict=True):
        # torchvision turns a magnitude around where its random number is at most a half.
        monkeypatch.setattr(torch, "rand", lambda *a, sign=sign: torch.tensor(1 - sign))
        expected = theirs(image)
        different = ((one - expected).abs() > 1e-5).float().mean().item()
        assert different <= (2e-3 if name == "rotate" else 0.0), (signed, sign)


def test_rand_augment_applies_several_in_a_row():
    images = to_unit(pictures(200))

    def changed(operations: int) -> float:
        rng = np.random.default_rng(0)
        out = rand_augment(images, rng, operations=operations, magnitude=15)
        assert out.min() >= 0
        assert out.max() <= 1
        return float((out != images).flatten(1).any(1).float().mean())

    assert changed(0) == 0.0
    assert changed(1) < changed(2) <= changed(4)
    recipe = Recipe(crop=0.0, flip=False, rand_operations=2, rand_magnitude=15)
    a = augment(pictures(), recipe, np.random.default_rng(3))
    b = rand_augment(to_unit(pictures()), np.random.default_rng(3), operations=2, magnitude=15)
    assert torch.equal(a, b)


def test_one_policy_of_augmentation_at_a_time():
    with pytest.raises(UsageError, match="trivial and rand_operations cannot both be on"):
        STRONG.override({"rand_operations": 2})


def test_shift_flip_moves_pixels_and_pads_with_zeros():
    images = pictures(200, 8, 8) // 2 + 1  # no pixel is 0, so zeros are padding
    out = shift_flip(images, 0.25, True, np.random.default_rng(0))
    seen = set()
    for before, after in zip(images, out, strict=True):
        found = [
            (dy, dx, flip)
            for dy in range(-2, 3)
            for dx in range(-2, 3)
            for flip in (False, True)
            if torch.equal(_shifted(before, dy, dx, flip), after)
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 50  # every shift, flipped and not


def _shifted(image: torch.Tensor, dy: int, dx: int, flip: bool) -> torch.Tensor:
    padded = torch.zeros(12, 12, 3, dtype=torch.uint8)
    padded[2:10, 2:10] = image
    moved = padded[2 + dy : 10 + dy, 2 + dx : 10 + dx]
    return moved.flip(1) if flip else moved


def test_without_augmentation_nothing_changes():
    recipe = Recipe(crop=0.0, flip=False)
    out = augment(pictures(), recipe, np.random.default_rng(0))
    assert torch.equal(out, to_unit(pictures()))


def test_erase_fills_one_rectangle_with_the_mean():
    images = to_unit(pictures(100, 32, 32))
    out = erase(images, 0.5, np.random.default_rng(0))
    changed = (out != images).any(1)
    touched = [m for m in changed if m.any()]
    assert 25 < len(touched) < 75
    for mask in touched:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box.float().mean() > 0.98  # a pixel may equal the mean
    first = int(changed.flatten(1).any(1).nonzero()[0])
    y, x = (int(v) for v in changed[first].nonzero()[0])
    torch.testing.assert_close(out[first, :, y, x], images[first].mean((1, 2)))


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)])
def test_mixed_labels_say_what_is_in_the_image(mixup, cutmix):
    # Image i is constant i / 64, so its mean tells the true shares of its two halves.
    count = 64
    images = (torch.arange(count) / count).view(-1, 1, 1, 1).expand(-1, 3, 16, 16).contiguous()
    recipe = Recipe(mixup=mixup, cutmix=cutmix)
    out, targets = mix(images, torch.arange(count), recipe, np.random.default_rng(0))
    labels = targets.for_classes(count)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    expected = labels @ (torch.arange(count) / count)
    torch.testing.assert_close(out.mean((1, 2, 3)), expected, atol=1e-5, rtol=1e-4)
    assert (labels.amax(1) < 0.999).float().mean() > 0.5


def test_without_mixing_labels_stay_class_ids():
    _, targets = mix(to_unit(pictures()), torch.arange(8), Recipe(), np.random.default_rng(0))
    assert torch.equal(targets.for_classes(10), torch.arange(8))


def test_a_missing_label_has_no_part_in_a_row():
    labels = torch.tensor([2, -1, 0, -1])
    assert torch.equal(
        Targets(labels).for_classes(3, partial=True),
        torch.tensor([[0.0, 0, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0]]),
    )
    share = torch.tensor([0.75, 0.25, 0.5, 1.0])
    mixed = Targets(labels, labels.flip(0), share).for_classes(3, partial=True)
    assert torch.equal(mixed, torch.tensor([[0, 0, 0.75], [0.75, 0, 0], [0.5, 0, 0], [0, 0, 0]]))


def test_an_epoch_has_its_own_numbers():
    def run(seed: int, epoch: int) -> torch.Tensor:
        rng = epoch_rng(seed, epoch)
        images = augment(pictures(), STRONG, rng)
        return mix(images, torch.arange(8), STRONG, rng)[0]

    assert torch.equal(run(0, 3), run(0, 3))
    assert not torch.equal(run(0, 3), run(0, 4))
    assert not torch.equal(run(0, 3), run(1, 3))
