"""Normalization: its text form and its arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq.data import Normalization
from mpq.data.normalize import NAMED
from mpq.errors import DataError

finite = st.floats(-4, 4)
positive = st.floats(1e-3, 4)


@pytest.mark.parametrize("name", ["imagenet", "cifar10", "cifar100", "none", "raw"])
def test_names_come_back_as_names(name):
    parsed = Normalization.parse(f" {name.upper()} ")
    assert str(parsed) == name
    numbers = "/".join(",".join(map(repr, part)) for part in (parsed.mean, parsed.std))
    assert str(Normalization.parse(numbers)) == name


@given(st.tuples(finite, finite, finite), st.tuples(positive, positive, positive))
def test_parse_and_str_are_inverses(mean, std):
    value = Normalization(mean, std)
    assert Normalization.parse(str(value)) == value


def test_numbers_may_have_spaces():
    parsed = Normalization.parse("0.5, .4,0.3 / 1, 2,3")
    assert parsed == Normalization((0.5, 0.4, 0.3), (1.0, 2.0, 3.0))
    assert str(parsed) == "0.5,0.4,0.3/1.0,2.0,3.0"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("imagnet", "Got 'imagnet'; did you mean imagenet"),
        ("", "must be imagenet, cifar10, cifar100, none, raw, or mean/std as m,m,m/s,s,s"),
        ("1,2,3", "Got '1,2,3'"),
        ("1,2,3/4,5,x", "Got '1,2,3/4,5,x'"),
        ("1,2,3/4,5,6/7", "Got '1,2,3/4,5,6/7'"),
        ("0.5,0.4/0.5", r"as many means as .* 3 means and 3 standard .* RGB. Got 2 and 1"),
        ("0,0,0/1,0,1", "standard deviations above 0"),
        ("0,0,0/1,-1,1", "standard deviations above 0"),
        ("nan,0,0/1,1,1", "must have finite means"),
        ("0,0,0/1,inf,1", "must have finite means"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(DataError, match=message):
        Normalization.parse(text)


@pytest.mark.parametrize("name", sorted(NAMED))
def test_apply_against_float64(name):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype=np.uint8)
    kept = images.copy()
    chosen = NAMED[name]
    out = chosen.apply(images)
    expected = (images / 255.0 - np.array(chosen.mean)) / np.array(chosen.std)
    assert out.dtype == np.float32
    assert out.flags.c_contiguous
    assert np.allclose(out, expected.transpose(0, 3, 1, 2), rtol=1e-5, atol=1e-6)
    assert np.array_equal(images, kept)


def test_apply_to_nothing():
    assert NAMED["none"].apply(np.zeros((0, 4, 4, 3), np.uint8)).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((4, 4, 3), "uint8"), ((1, 4, 4, 3), "float64"), ((2, 4, 4), "uint8")]
)
def test_apply_refuses_other_arrays(shape, dtype):
    with pytest.raises(DataError, match=rf"must be uint8 \[n, H, W, C\]. Got {dtype}"):
        NAMED["none"].apply(np.zeros(shape, dtype))


@pytest.mark.parametrize("channels", [1, 2, 4, 5])
def test_normalization_is_of_as_many_channels_as_images_have(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, channels), dtype=np.uint8)
    planes = images.transpose(0, 3, 1, 2) / 255
    own = ",".join(f"0.{i + 1}" for i in range(channels))
    each = np.array([(i + 1) / 10 for i in range(channels)])[:, None, None]
    for text, expected in (
        (f"{own}/{own}", (planes - each) / each),
        ("0.5/0.25", (planes - 0.5) / 0.25),
        ("raw", planes * 255),
    ):
        assert np.allclose(Normalization.parse(text).apply(images), expected, atol=1e-5)
    with pytest.raises(DataError, match=rf"imagenet is for images of 3 .* these have {channels}"):
        NAMED["imagenet"].apply(images)


def test_floats_are_what_the_network_takes_and_only_turned():
    images = np.random.default_rng(0).normal(size=(2, 4, 5, 1)).astype(np.float32)
    assert np.array_equal(NAMED["imagenet"].apply(images), images.transpose(0, 3, 1, 2))
