"""Whole splits as arrays: decoded once, decoded again when files change, never lost to a cache."""

from __future__ import annotations

import json
import os
import time
import zipfile

import numpy as np
import pytest
from PIL import Image

from mpq.cli import main
from mpq.data import cache, load_arrays, open_data
from mpq.data.cache import trim
from mpq.data.folders import FolderSplit
from mpq.data.stream import Stream
from mpq.limits import limited


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """60 random images in two classes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MPQ_DATA", raising=False)
    return write(tmp_path / "d.zip", seed=0)


def write(path, seed):
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as file:
        for i in range(60):
            pixels = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            with file.open(f"{'ab'[i % 2]}/{i}.png", "w") as member:
                Image.fromarray(pixels).save(member, "PNG")
    return path


def files(folder):
    return sorted(p.name for p in folder.glob("*"))


@pytest.fixture
def decodes(monkeypatch):
    """How many images were decoded so far."""
    seen = []
    read = FolderSplit.read
    monkeypatch.setattr(FolderSplit, "read", lambda s, i: seen.append(len(i)) or read(s, i))
    return lambda: sum(seen)


def test_arrays_are_what_reading_gives(archive):
    data = open_data(archive)
    for source in (data.train, data.validation, data.test):
        pixels, labels = load_arrays(source)
        assert type(pixels) is np.ndarray
        assert pixels.flags.writeable
        assert np.array_equal(pixels, source.read(range(len(source))))
        assert np.array_equal(labels, source.labels)


def test_splits_of_one_parent_are_decoded_once(archive, tmp_path, decodes):
    data = open_data(archive)
    load_arrays(data.train)
    assert decodes() == 60
    load_arrays(data.validation)
    load_arrays(open_data(archive, seed=7).train)
    assert decodes() == 60
    assert len(files(tmp_path / "cache")) == 1


def test_a_changed_archive_and_another_size_are_decoded_again(archive, decodes):
    before, _ = load_arrays(open_data(archive).test)
    write(archive, seed=1)
    os.utime(archive, ns=(1, 1))
    after, _ = load_arrays(open_data(archive).test)
    assert decodes() == 120
    assert not np.array_equal(before, after)
    assert load_arrays(open_data(archive, size=(3, 3)).test)[0].shape == (12, 3, 3, 3)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY\x01\x00"])
def test_a_damaged_cache_is_written_again(archive, tmp_path, decodes, content):
    expected, _ = load_arrays(open_data(archive).test)
    (name,) = files(tmp_path / "cache")
    (tmp_path / "cache" / name).write_bytes(content)
    again, _ = load_arrays(open_data(archive).test)
    assert np.array_equal(again, expected)
    assert decodes() == 120


def test_a_cache_cut_short_is_written_again(archive, tmp_path):
    expected, _ = load_arrays(open_data(archive).test)
    (name,) = files(tmp_path / "cache")
    os.truncate(tmp_path / "cache" / name, 500)
    assert np.array_equal(load_arrays(open_data(archive).test)[0], expected)


def test_a_cache_that_cannot_be_written_is_logged(archive, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "file" / "cache"))
    data = open_data(archive)
    pixels, _ = load_arrays(data.test)
    assert np.array_equal(pixels, data.test.read(range(len(data.test))))
    assert "decoded images are not cached in" in caplog.text


def test_a_full_disk_leaves_no_half_written_file(archive, tmp_path, monkeypatch, caplog):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    pixels, _ = load_arrays(open_data(archive).test)
    assert pixels.shape == (12, 6, 6, 3)
    assert files(tmp_path / "cache") == []
    assert "No space left" in caplog.text


def test_a_split_beyond_the_limit_is_streamed_and_not_cached(archive, tmp_path):
    data = open_data(archive)
    with limited(arrays_mb=1e-6):
        images, labels = load_arrays(data.test)
    assert isinstance(images, Stream)
    assert np.array_equal(images[2:5], data.test.read([2, 3, 4]))
    assert images.shape == (len(labels), 6, 6, 3)
    assert files(tmp_path / "cache") == []


def test_default_folder_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("MPQ_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "mpq"


def test_the_cache_is_shown_trimmed_and_emptied(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path))
    for age, name in ((30, "b"), (20, "c"), (10, "a")):
        (tmp_path / name).write_bytes(bytes(400_000))
        os.utime(tmp_path / name, (time.time() - age, time.time() - age))
    assert main(["cache", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "folder": str(tmp_path),
        "files": 3,
        "bytes": 1_200_000,
        "limit_mb": 20_000.0,
        "cleared": False,
    }
    with limited(cache_mb=1.0):
        trim(tmp_path / "b")  # the oldest, but just written
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert main(["cache", "--clear"]) == 0
    assert "2 files, 0.8 MB removed" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
