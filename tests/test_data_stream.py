"""Data of any size: shards, streams that equal arrays, torch data sets, transforms, bad input."""

from __future__ import annotations

import io
import os
import signal
import sys
import tarfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import NORMALIZE, assert_equal_weights, network, pictures
from torch import nn

from mpq.data import Normalization, load_arrays, open_data, sample_indices
from mpq.data.folders import FolderSplit
from mpq.data.stream import Stream, set_workers, workers
from mpq.errors import DataError
from mpq.limits import limited
from mpq.pipeline.subject import Subject
from mpq.policy import ModelInfo
from mpq.rundir import Run
from mpq.train.deliver import deliver
from mpq.train.evaluate import accuracy
from mpq.train.feed import Share, Streamed
from mpq.train.loop import fit
from mpq.train.plan import Hooks, Stop, TrainingData, TrainingPlan
from mpq.train.recipe import Recipe
from mpq.train.transforms import transform_of
from mpq.userimport import trusting

RECIPE = Recipe(epochs=2, batch=24, accumulate=2, lr=0.05, mixup=0.2, erase=0.3)
STREAMED = {"arrays_mb": 1e-6}
"""Whatever lies in files is streamed."""


@contextmanager
def working(count: int):
    """Let so many processes decode while the block runs."""
    before = workers()
    set_workers(count)
    try:
        yield
    finally:
        set_workers(before)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MPQ_DATA", raising=False)


def png(pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shards(folder: Path, prefix: str = "train", count: int = 3, size: int = 40) -> Path:
    """WebDataset's: `000.png` and `000.cls`, whose keys begin anew in each shard."""
    folder.mkdir(exist_ok=True)
    images, labels = pictures(count * size)
    for shard in range(count):
        files = {}
        for at in range(size):
            index = shard * size + at
            files[f"{at:03}.png"] = png(images[index])
            files[f"{at:03}.cls"] = str(labels[index]).encode()
        write_tar(folder / f"{prefix}-{shard:03}.tar", files)
    return folder


def streams(data, split="train") -> tuple[Stream, np.ndarray]:
    with limited(**STREAMED):
        found, labels = load_arrays(getattr(data, split))
    assert isinstance(found, Stream)
    return found, labels


# -- shards --------------------------------------------------------------------------------------


def test_shards_are_read_by_index_in_any_order(tmp_path):
    shards(shards(tmp_path / "set"), "val", count=1)
    data = open_data("set")
    assert data.classes == ("0", "1", "2", "3")
    assert (len(data.train), len(data.validation), len(data.test)) == (108, 12, 40)
    quadrant = data.test.read(range(40)).astype(int)[..., 0].reshape(40, 2, 4, 2, 4).mean((2, 4))
    assert quadrant.reshape(40, 4).argmax(1).tolist() == data.test.labels.tolist()
    backwards = data.test.read(range(39, -1, -1))
    assert np.array_equal(backwards[::-1], data.test.read(range(40)))


def test_a_tar_of_class_folders_and_one_without_labels(tmp_path):
    image = png(pictures(1)[0][0])
    path = write_tar(tmp_path / "a.tar", {f"./{c}/{i}.png": image for c in "ab" for i in range(9)})
    assert open_data(path).classes == ("a", "b")
    assert not open_data(write_tar(tmp_path / "b.tar", {"x.png": image, "y.png": image})).labelled


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2 + 100], "complete tar archive.*cut short"),
        (lambda data: data[:1000], "complete tar archive"),
        (lambda data: b"\x1f\x8b" + data[2:], "complete tar archive.*compressed"),
    ],
)
def test_a_shard_cut_short(tmp_path, damage, message):
    path = shards(tmp_path / "set") / "train-001.tar"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"train-001\.tar must be a {message}"):
        open_data("set")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.cls": b"0", "b.cls": b"dog"}, r"b\.cls in .* must hold a class id.*Got b'dog'"),
        ({"a.cls": b"0"}, r"b\.png has none: it must be in b\.cls"),
        ({"a.cls": b"0", "b.cls": b"-1"}, "must hold a class id"),
    ],
)
def test_class_ids_of_a_shard(tmp_path, files, message):
    image = png(pictures(1)[0][0])
    write_tar(tmp_path / "a.tar", {"a.png": image, "b.png": image, **files})
    with pytest.raises(DataError, match=message):
        open_data("a.tar")


# -- streams equal arrays ------------------------------------------------------------------------


def train(data: TrainingData, folder: Path | None = None, **options):
    hooks = options.pop("hooks", None)
    model = network()
    transform = options.pop("transform", None)
    plan = TrainingPlan(RECIPE, transform=transform)
    return model, fit(model, data, plan, Run(folder, **options), hooks)


@pytest.mark.parametrize("count", [0, 2])
def test_a_streamed_training_is_that_of_arrays(tmp_path, count):
    shards(tmp_path / "set")
    data = open_data("set")
    held = load_arrays(data.validation)
    arrays, _ = train(TrainingData(load_arrays(data.train), held, NORMALIZE))
    with working(count):
        stream = TrainingData(streams(data), streams(data, "validation"), NORMALIZE)
        streamed, found = train(stream)
    assert_equal_weights(arrays, streamed)
    assert found.top1 == accuracy(arrays, *held, NORMALIZE)


def test_a_streamed_run_is_resumed_exactly(tmp_path):
    shards(tmp_path / "set")
    data = open_data("set")
    crop = transform_of("crop", (8, 8))
    stream = TrainingData(streams(data), None, NORMALIZE)

    def stop(record) -> None:
        raise Stop

    with working(1):
        whole, _ = train(stream, transform=crop)
    with working(2), pytest.raises(Stop):
        train(stream, tmp_path / "run", transform=crop, hooks=Hooks(on_epoch=stop))
    with working(0):
        resumed, _ = train(stream, tmp_path / "run", transform=crop, resume=True)
    assert_equal_weights(whole, resumed)


def test_only_what_is_asked_for_is_decoded(tmp_path, monkeypatch):
    shards(tmp_path / "set")
    seen: list[int] = []
    read = FolderSplit.read
    monkeypatch.setattr(FolderSplit, "read", lambda s, i: seen.append(len(i)) or read(s, i))
    data = open_data("set", size=(8, 8))
    data.train.read(sample_indices(data.train, 16, 0))
    images, _ = streams(data)
    assert images.shape == (86, 8, 8, 3)
    assert images[3:7].shape == (4, 8, 8, 3)
    assert seen == [16, 4]
    assert not (tmp_path / "cache").exists()


# -- torch data sets -----------------------------------------------------------------------------

FACTORIES = """
import numpy as np, torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision import tv_tensors
from torchvision.transforms import v2

class Pictures(Dataset):
    def __init__(self, kind="pil", count=60, odd=None):
        self.kind, self.count, self.odd = kind, count, odd
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if i == self.odd:
            return self.strange(i)
        pixels = np.full((8, 8, 3), i, np.uint8)
        if self.kind == "pil":
            return Image.fromarray(pixels), i % 3
        tensor = torch.from_numpy(pixels).permute(2, 0, 1)
        return (tensor if self.kind == "uint8" else tensor / 255), i % 3
    def strange(self, i):
        raise OSError(f"no file {i}")

class Smaller(Pictures):
    def strange(self, i):
        return torch.zeros(3, 4, 4, dtype=torch.uint8), 0

class Listed(Pictures):
    targets = [i % 3 for i in range(60)]

class Endless(IterableDataset):
    def __iter__(self):
        items, at = Pictures("float"), 0
        while True:
            yield items[at % 60]
            at += 1

def endless(): return Endless()
def endless_loader(): return DataLoader(Endless(), batch_size=16)
def pil(): return Pictures()
def uint8(): return {"train": Pictures("uint8"), "test": Pictures("uint8", 9)}
def floats(): return Pictures("float")
def broken(): return Listed(odd=7)
def smaller(): return Smaller("uint8", odd=7)
def empty(): return Pictures(count=0)
def loader(): return DataLoader(Pictures("uint8"), batch_size=4)
def listed(): return Listed()
def fails(): raise KeyError("no such set")

def flip(): return v2.RandomHorizontalFlip(1.0)
def nothing(): return None
def wrong(): return v2.Resize((3, 3))
def raises():
    def transform(image): raise ValueError("cannot")
    return transform
"""


def test_pictures_without_labels_get_the_same_ones_in_files_and_in_memory(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(pictures(24)[0]):
        (folder / f"{index:02}.png").write_bytes(png(image))
    torch.manual_seed(0)
    net, info = (
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 4)),
        ModelInfo(arch="net", classes=4, input=(3, 8, 8)),
    )
    subject = Subject(net, info, open_data(str(folder)), "pictures", Normalization.parse("none"))
    images, labels = subject.learned()
    streamed, told = subject.learned(in_files=True)
    assert isinstance(streamed, Stream)
    assert np.array_equal(streamed[:], images)
    assert told.tolist() == labels.tolist()
    assert len(set(told.tolist())) > 1


@pytest.fixture
def factories(tmp_path):
    (tmp_path / "streamdata.py").write_text(FACTORIES)
    names = [line.split("(")[0][4:] for line in FACTORIES.splitlines() if line.startswith("def ")]
    with trusting(*(f"streamdata:{name}" for name in names)):
        yield
    sys.modules.pop("streamdata", None)


@pytest.mark.parametrize("name", ["pil", "uint8", "listed"])
def test_a_data_set_of_pictures_is_a_split(factories, name):
    data = open_data(f"streamdata:{name}", size=(3, 8, 8))
    assert data.classes == ("0", "1", "2")
    picked = data.train.read([0, 5])
    assert picked.dtype == np.uint8
    assert (picked[:, 0, 0, 0] % 3).tolist() == data.train.labels[[0, 5]].tolist()
    images, _ = streams(data)
    assert np.array_equal(images[:2], data.train.read([0, 1]))


def test_class_ids_that_a_data_set_lists_need_no_item(factories):
    data = open_data("streamdata:broken")
    assert data.train.parent.labels.tolist() == [i % 3 for i in range(60)]


def test_floats_are_inputs_as_the_network_takes_them(factories):
    data = open_data("streamdata:floats")
    assert not data.pixels
    assert data.train.read([0])["input"].shape == (1, 3, 8, 8)


def test_a_loader_beyond_memory_is_read_by_its_data_set(factories):
    with limited(**STREAMED):
        assert isinstance(load_arrays(open_data("streamdata:loader").train)[0], Stream)


@pytest.mark.parametrize("name", ["endless", "endless_loader"])
def test_of_a_stream_without_end_a_sample_is_taken(factories, name, caplog):
    with limited(arrays_mb=0.1, stream_samples=400):  # 130 samples of 768 bytes
        data = open_data(f"streamdata:{name}", holdout=16)
    assert len(data.train) + len(data.validation) + len(data.test) == 131
    assert "131 samples are taken (limits arrays-mb and stream-samples)" in caplog.text
    assert sorted(set(data.train.labels)) == [0, 1, 2]


# -- transforms ----------------------------------------------------------------------------------


def test_crop_is_random_and_depends_on_the_sample_alone(tmp_path):
    shards(tmp_path / "set")
    data = streams(open_data("set"))
    crop = transform_of("crop", (8, 8))
    from mpq.train.transforms import Transformed

    one, again, other = (Transformed(data[0], crop, (0, view)) for view in (0, 0, 1))
    state = torch.get_rng_state()
    batch = one(np.arange(6))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(batch[[4, 2]], again(np.array([4, 2])))
    assert not np.array_equal(batch, other(np.arange(6)))


def test_a_transform_of_ones_own(factories, tmp_path):
    shards(tmp_path / "set")
    data = open_data("set")
    images = streams(data)[0]
    from mpq.train.transforms import Transformed

    flipped = Transformed(images, transform_of("streamdata:flip", (8, 8)), (0, 0))(np.arange(4))
    assert np.array_equal(flipped, images[:4][:, :, ::-1])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("streamdata:nothing", "must give a transform.*Got NoneType"),
        ("streamdata:fails", r"failed with KeyError: 'no such set', at .*streamdata\.py"),
        ("other", "must be crop or module:factory"),
    ],
)
def test_no_transforms(factories, name, message):
    with pytest.raises(ValueError, match=message):
        transform_of(name, (8, 8))


# -- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("streamdata:wrong", r"must give images uint8 \[8, 8, 3\].*Got uint8 \[3, 3, 3\]"),
        ("streamdata:raises", r"failed with ValueError: cannot, at .*`def transform"),
    ],
)
def test_a_transform_that_fails_in_a_worker(factories, tmp_path, name, message, count):
    shards(tmp_path / "set")
    data = TrainingData(streams(open_data("set")), None, NORMALIZE)
    with working(count), pytest.raises(DataError, match=message):
        train(data, transform=transform_of(name, (8, 8)))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smaller", r"must be uint8 \[8, 8, 3\].*as the first is.*\[4, 4, 3\] of item 7"),
        ("broken", r"item 7 of .* failed with OSError: no file 7, at .*streamdata\.py"),
        ("empty", "must have at least one item"),
        ("fails", r"streamdata:fails failed with KeyError.*streamdata\.py"),
    ],
)
def test_data_sets_that_fail(factories, name, message):
    def read() -> None:
        whole = open_data(f"streamdata:{name}").train.parent
        whole.read(range(len(whole)))

    with pytest.raises(DataError, match=message):
        read()


@pytest.mark.parametrize("count", [0, 1])
def test_a_picture_that_cannot_be_decoded_is_named(tmp_path, count):
    folder = shards(tmp_path / "set")
    path = folder / "train-001.tar"
    content = path.read_bytes()
    at = content.index(b"\x89PNG", len(content) // 2)
    path.write_bytes(content[:at] + b"\x00" * 60 + content[at + 60 :])
    data = TrainingData(streams(open_data("set", size=(8, 8))), None, NORMALIZE)
    message = r"image \d+\.png in .*train-001\.tar must be a complete image"
    with working(count), pytest.raises(DataError, match=message):
        train(data)


def _die(part) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed():
    with pytest.raises(DataError, match=r"that reads data died: .*--workers 0.*--resume"):
        list(deliver(_die, [1], 1))


# -- several processes ---------------------------------------------------------------------------


def test_two_processes_stream_each_image_once(tmp_path, two_processes):
    seen = [np.load(two_processes / f"seen{rank}.npy") for rank in (0, 1)]
    both = np.concatenate(seen, axis=1)
    assert [len(set(epoch)) for epoch in both] == [96, 96]  # all different: 4 steps of 24
    alone = feed((0, 1), shards(tmp_path / "set"))
    for epoch, mine in enumerate(epochs(alone)):
        assert sorted(mine) == sorted(both[epoch])


def feed(place: tuple[int, int], folder: Path) -> Streamed:
    with limited(**STREAMED):
        data = load_arrays(open_data(folder, holdout=0).train)
    return Streamed(data, RECIPE, Share(0, torch.device("cpu"), *place))


def epochs(streamed: Streamed) -> list[list[int]]:
    """Which images a process sees in two epochs: what arrives are those that were asked for."""
    found = []
    for view in (0, 1):
        streamed.begin(view)
        seen: list[int] = []
        for parts in streamed.parts():
            for part in parts:
                batch = streamed._batch(part)
                assert np.array_equal(batch.numpy(), streamed.images[part.numpy()])
                seen += part.tolist()
        found.append(seen)
    return found
