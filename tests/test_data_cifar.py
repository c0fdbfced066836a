"""CIFAR as official batches, folders and archives: the same images, labels and splits."""

from __future__ import annotations

import csv
import gzip
import io
import os
import pickle
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mpq.data import load_arrays, open_data, sample_indices
from mpq.data.images import decode
from mpq.errors import DataError

NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
REAL = Path(os.environ["MPQ_DATA"]).resolve() if os.environ.get("MPQ_DATA") else None
needs_data = pytest.mark.skipif(
    REAL is None or not (REAL / "cifar10-test.zip").is_file(),
    reason="MPQ_DATA does not name a folder with cifar10-test.zip",
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MPQ_DATA", raising=False)


def make(count, classes=10, seed=0):
    """Images `[n, 32, 32, 3]` and labels of every class."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % classes)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), labels


def rows_of(images):
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), 3072))


def python2_batch(images, labels) -> bytes:
    """A batch as Python 2 pickled it (protocol 2, byte strings), which Python 3 never writes."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    rows = rows_of(images)
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    array += number(0) + b"\x85" + text(b"b") + b"\x87R"
    shape = number(rows.shape[0]) + number(rows.shape[1]) + b"\x86"
    array += b"(" + number(1) + shape + dtype + b"\x89" + text(rows.tobytes()) + b"tb"
    numbers = b"](" + b"".join(map(number, labels)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def write_batches(folder, protocol):
    """The official layout with 10 images in each of the six batches."""
    folder.mkdir(parents=True)
    parts = [make(10, seed=i) for i in range(6)]
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for name, (images, labels) in zip(files, parts, strict=True):
        if protocol == "python2":
            content = python2_batch(images, labels)
        else:
            batch = {b"data": rows_of(images), b"labels": labels.tolist()}
            content = pickle.dumps(batch, protocol=protocol)
        (folder / name).write_bytes(content)
    meta = {"label_names": list(NAMES), "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    return parts


def write_archives(root, parts):
    """The same images as archives, with their official order beside them."""
    root.mkdir(parents=True)
    rows = [("split", "index", "label", "class/stem")]
    archives = {
        "train": [zipfile.ZipFile(root / f"cifar10-train-{i}.zip", "w") for i in (0, 1)],
        "test": [zipfile.ZipFile(root / "cifar10-test.zip", "w")],
    }
    stems = np.random.default_rng(9).permutation(1000)
    for k, (images, labels) in enumerate(parts):
        split = "train" if k < 5 else "test"
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            index = (k * 10 + i) if split == "train" else i
            stem = f"{NAMES[label]}/x{stems[k * 10 + i]:04d}"
            rows.append((split, index, label, stem))
            archive = archives[split][index % len(archives[split])]
            with archive.open(f"{split}/{stem}.webp", "w") as member:
                Image.fromarray(image).save(member, "WEBP", lossless=True)
    for archive in (*archives["train"], *archives["test"]):
        archive.close()
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    (root / "cifar10-order.csv.gz").write_bytes(gzip.compress(text.getvalue().encode()))


@pytest.mark.parametrize("protocol", ["python2", 2, 5])
def test_official_batches(tmp_path, protocol):
    parts = write_batches(tmp_path / "data" / "cifar-10-batches-py", protocol)
    data = open_data("cifar10", holdout=5)
    assert data.classes == NAMES
    assert (len(data.train), len(data.validation), len(data.test)) == (45, 5, 10)
    images, labels = load_arrays(data.test)
    assert np.array_equal(images, parts[5][0])
    assert np.array_equal(labels, parts[5][1])
    assert data.train.parent.labels.tolist() == np.concatenate([p[1] for p in parts[:5]]).tolist()


def test_batches_and_archives_give_the_same_splits(tmp_path):
    parts = write_batches(tmp_path / "a" / "cifar-10-batches-py", 2)
    write_archives(tmp_path / "b", parts)
    one, two = (open_data("cifar10", root=tmp_path / root) for root in "ab")
    assert one.classes == two.classes
    for split in ("train", "validation", "test"):
        first, second = load_arrays(getattr(one, split)), load_arrays(getattr(two, split))
        assert np.array_equal(first[0], second[0])
        assert np.array_equal(first[1], second[1])


def test_archives_without_an_order_are_sorted_by_name(tmp_path):
    parts = [make(10, seed=i) for i in range(6)]
    write_archives(tmp_path / "b", parts)
    (tmp_path / "b" / "cifar10-order.csv.gz").unlink()
    data = open_data("cifar10", root="b")
    assert data.test.labels.tolist() == list(range(10))
    assert (len(data.train), len(data.validation)) == (45, 5)


@pytest.mark.parametrize(
    "name", ["cifar-10-batches-py", "b/cifar-10-batches-py", "b/cifar10/cifar-10-batches-py"]
)
def test_places_of_the_official_folder(tmp_path, name):
    write_batches(tmp_path / name, 2)
    root = None if "/" not in name else "b"
    assert len(open_data("cifar10", root=root).test) == 10
    assert len(open_data(name).test) == 10  # as a path too
    assert open_data("cifar10", root=tmp_path / name, size=(8, 8)).test.read([0]).shape[1] == 8


def test_cifar100_batches(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, seed in (("train", 0), ("test", 1)):
        images, labels = make(200, classes=100, seed=seed)
        coarse = (labels // 5).tolist()
        batch = {
            b"data": rows_of(images),
            b"fine_labels": labels.tolist(),
            b"coarse_labels": coarse,
        }
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    names = [f"c{i:02d}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": names}, protocol=2))
    data = open_data("cifar100")
    assert len(data.classes) == 100
    assert np.array_equal(data.test.labels, make(200, classes=100, seed=1)[1])


def test_cifar_that_is_nowhere(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(
        DataError, match=r"cifar10 is not there. Looked for .*-batches-py.* in data/, "
    ):
        open_data("cifar10")


def test_a_batch_that_would_run_code(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder, 2)
    (folder / "data_batch_3").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(DataError, match=r"data_batch_3 .*it wants to call os\.system"):
        open_data("cifar10")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"test_batch is missing beside the other CIFAR files"),
        (b"", r"test_batch must be a CIFAR file"),
        (python2_batch(*make(10))[:5000], r"test_batch must be a CIFAR file"),
        (pickle.dumps([1, 2]), r"test_batch must hold a dictionary. Got list"),
        (pickle.dumps({"data": [1], "labels": [1]}), r"test_batch must hold uint8 rows \[n, 3072"),
        (
            pickle.dumps({"data": rows_of(make(10)[0]), "labels": [1]}),
            r"test_batch must hold uint8 rows \[n, 3072\] and n labels",
        ),
        (
            pickle.dumps({"data": rows_of(make(2)[0]), "labels": [1, 77]}),
            r"labels of the test split of cifar10 must be 0\.\.9. Got 1\.\.77",
        ),
    ],
)
def test_damaged_batches(tmp_path, content, message):
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder, 2)
    (folder / "test_batch").unlink()
    if content is not None:
        (folder / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_data("cifar10")


def test_archives_that_are_not_cifar10(tmp_path):
    write_archives(tmp_path / "b", [make(10, classes=9, seed=i) for i in range(6)])
    with pytest.raises(DataError, match=r"cifar10 must have 10 classes. Got 9 in b/cifar10-test"):
        open_data("cifar10", root="b")


def test_a_missing_archive(tmp_path):
    write_archives(tmp_path / "b", [make(10, seed=i) for i in range(6)])
    (tmp_path / "b" / "cifar10-test.zip").unlink()
    with pytest.raises(DataError, match=r"must have train and test images.*cifar10-test\.zip side"):
        open_data("cifar10", root="b")


def test_a_part_that_is_missing_is_told(tmp_path, caplog):
    write_archives(tmp_path / "b", [make(10, seed=i) for i in range(6)])
    open_data("cifar10", root="b")
    assert "cifar10 has 50 training and 10 test images, not 50000 and 10000" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"split,index\ntrain,1\n", mtime=0)],
    ids=["text", "short"],
)
def test_a_damaged_order(tmp_path, content):
    write_archives(tmp_path / "b", [make(10, seed=i) for i in range(6)])
    (tmp_path / "b" / "cifar10-order.csv.gz").write_bytes(content)
    with pytest.raises(DataError, match=r"order\.csv\.gz must have rows split,index,label,class"):
        open_data("cifar10", root="b")


@needs_data
@pytest.mark.parametrize(("name", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_real_archives(name, classes, monkeypatch):
    data = open_data(name, root=REAL)
    assert len(data.classes) == classes
    assert (len(data.train), len(data.validation), len(data.test)) == (45_000, 5_000, 10_000)
    for source, each in ((data.validation, 5_000), (data.test, 10_000), (data.train, 45_000)):
        assert np.bincount(source.labels).tolist() == [each // classes] * classes
    decoded = []
    monkeypatch.setattr(
        "mpq.data.folders.decode", lambda *a, **k: decoded.append(1) or decode(*a, **k)
    )
    images = data.train.read(sample_indices(data.train, 512, 0))
    assert images.shape == (512, 32, 32, 3)
    assert len(decoded) == 512  # and none of the others


@needs_data
def test_real_statistics_and_official_order():
    data = open_data("cifar10", root=REAL)
    mean = data.train.read(sample_indices(data.train, 2000, 0)).mean(axis=(0, 1, 2)) / 255
    assert np.allclose(mean, (0.4914, 0.4822, 0.4465), atol=0.01)
    if (REAL / "cifar10-order.csv.gz").is_file():
        assert data.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
        assert data.train.parent.labels[:5].tolist() == [6, 9, 9, 4, 1]
